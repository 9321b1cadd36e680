"""Linear layers over packed weights, a file a device, and what stands between them.

| file | idea |
|---|---|
| `packed` | what such a layer is, and the one that runs any format anywhere |
| `choice` | which layer runs a format on a device |
| `cpu`, `cpu_products` | a CPU: packed kernels for few rows, products in the type that it multiplies fast for many |
| `cuda`, `small_batch` | a GPU, and its products of few rows |
| `fused` | layers that read one input, as one product |
| `elementwise` | norms, activations and rounding, by a kernel that was tried against what it replaces |
"""
