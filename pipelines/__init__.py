"""The flow: `attempt`, the loop `optimize`, `rebuild` for schedules, and the `trimtab` command."""
