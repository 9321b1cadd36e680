"""What speaks to a Kubeflow Pipelines server; and, in a pod, to the cluster that it runs on."""
