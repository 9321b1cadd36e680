"""One model over several processes: who they are, and which part each holds."""
