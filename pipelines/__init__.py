"""The flow: `attempt`, the loop `optimize`, and the `trimtab` command."""
