"""Serving: how large an engine must be for its work, and the files that servers read."""
