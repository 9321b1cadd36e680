"""The plan of a run: which recipes are tried on a target, each with an engine, and which items judge them.

| file | idea |
|---|---|
| `matrix` | goal, model and target become a ladder of recipes |
| `candidates` | the techniques that a goal asks for, in order |
| `placement`, `engine`, `parallelism` | the engine that serves a recipe: devices, batch, context |
| `checks`, `installed` | why a target, or this machine, cannot run a recipe |
| `dealing`, `task_sizes` | which items of which task serve which look |
"""
