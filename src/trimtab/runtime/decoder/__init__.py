"""The model as an engine holds it: assembled from an export, and decoded a token at a time.

| file | idea |
|---|---|
| `assemble` | builds a model from an export |
| `head` | the output head, only where a token is scored |
| `step`, `decode` | a decoding step with few kernels, and a batch that decodes |
| `float16_range`, `gpu_memory` | what does not fit: numbers into float16, a model into a GPU |
"""
