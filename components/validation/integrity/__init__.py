"""Is the export what the recipe asked for, and whole?

| file | idea |
|---|---|
| `gate` | the whole check, cheapest parts first |
| `declaration` | the files that say how it is quantized, against each other |
| `coverage` | these layers in this format, these tensors, so many bytes |
| `weights` | its numbers, against the source's |
| `folds` | channel scales that went into the layer before |
| `likeness` | how much of a source's layer stands in the stored one |
| `reading` | both checkpoints as streams |
| `reload` | whether it loads, and writes text |
"""
