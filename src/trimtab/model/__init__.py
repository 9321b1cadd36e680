"""What is known of a model before it runs.

| file | idea |
|---|---|
| `files`, `admission` | which files of a folder are the model, and whether it may be made smaller |
| `headers` | the tensors that its files hold |
| `layouts`, `low_precision` | how these become the layout that every stage reads |
| `licence` | under which licence it is published, as far as its files say so |
| `configured` | what its config.json says of sizes and of its head |
| `facts`, `outline` | its shapes, from its tensors or from its config.json alone |
| `linear_layers`, `shapes` | the layers that a format applies to, and what pruning leaves of them |
| `hardware` | the devices of a target, and what a back end runs there |
| `memory` | the bytes that serving and training take |
| `working_memory` | the bytes that the work of each stage holds |
"""
