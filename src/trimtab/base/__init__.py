"""What every room stands on: documents, errors, progress, child processes, keys.

| file | idea |
|---|---|
| `schema`, `schema_errors` | documents that are validated when they are read, and what a bad one is told |
| `user_document` | documents that a person writes: their fields' descriptions, examples and JSON schemas |
| `errors` | the exceptions, each with its exit code |
| `progress` | what long work says of itself |
| `child`, `fork_server`, `kills` | work in a process of its own, what such processes share, and who killed one |
| `session` | several calls in one process that stays |
| `environment` | the libraries and the device that a number was computed with |
| `signing` | keys, and what is signed with them |
"""
