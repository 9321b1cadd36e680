"""What speaks to a Kubeflow Pipelines server."""
