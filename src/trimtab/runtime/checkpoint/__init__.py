"""Models on disk: plain Hugging Face folders, and quantized exports as NVIDIA's ModelOpt writes them.

| file | idea |
|---|---|
| `model_files` | reads and writes both |
| `layer_layout` | how a quantized layer is stored, and which numbers it stands for |
| `few_bits` | what stands for a float32 in types of fewer bits |
| `finite` | whether its numbers are numbers |
| `config_file` | the one writer of config.json |
| `skeleton` | a model without weights: transformers' modules under the checkpoint's names |
| `text_model` | the text model of a wrapper, alone |
| `experts` | the experts of a block, a linear layer each |
| `scans` | state-space layers that read a batch in parts |
| `stream` | rewrites a checkpoint a shard at a time |
| `compressed_tensors` | what vLLM does not read of an export, written anew |
"""
