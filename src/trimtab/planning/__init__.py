"""The plan of a run: which recipes are tried on a target, each with an engine, and which items judge them.

| file | idea |
|---|---|
| `matrix` | goal, model and target become a ladder of recipes |
| `techniques` | what a goal's row asks for, a function a technique |
| `candidates`, `remarks` | the recipes that techniques are made of, and what each is good for besides |
| `placement`, `engine`, `parallelism` | the engine that serves a recipe: devices, batch, context |
| `search` | recipe and serving plan together, for a workload, by measured speeds |
| `resources` | what each stage needs: devices, memory, disk, time |
| `checks`, `installed` | why a target, or this machine, cannot run a recipe |
| `dealing`, `task_sizes` | which items of which task serve which look |
| `drawing` | what they can show, and how many more are drawn so that they decide |
"""
