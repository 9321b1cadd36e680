"""From a release to a service in a cluster: a canary, compared, approved, then promoted or rolled back."""
