"""The `trimtab` command, a file a subject; `main` puts them together."""
