"""Kernels in Triton, and what launches them with little overhead; nothing here knows a model.

| file | idea |
|---|---|
| `matmul`, `tile`, `words` | products of few rows with packed weights, how they are cut, how weights stand |
| `paged_attention`, `spans` | attention over a paged KV cache, and how its work is cut |
| `decoding` | what stands between the products of a decoding step |
| `columns` | what GPTQ does to a block of columns, one after the other |
| `replacements` | modules of transformers that are cheaper in another shape |
| `cuda_graphs` | steps that are recorded once and replayed |
"""
