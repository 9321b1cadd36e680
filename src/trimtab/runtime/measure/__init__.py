"""What is measured of a model while it runs on calibration text: statistics, Gram matrices, gradients.

| file | idea |
|---|---|
| `blockwise` | carries text through a checkpoint a block at a time |
| `block` | one block with its weights in place, and what it reads |
| `block_calls` | what a model gives its blocks beside hidden states, and whether it can be given again |
| `block_weights` | the weights of one block, read ahead |
| `activations` | hidden states, on the device, in host memory or in a file |
| `observe` | statistics of inputs and blocks |
| `grams` | Gram matrices of a block |
| `gradients` | how strongly the output depends on each layer's |
| `routing` | experts that are given few tokens |
| `measurements` | what was measured, as a folder |
"""
