"""Models on disk: plain Hugging Face folders, and quantized exports as NVIDIA's ModelOpt writes them.

| file | idea |
|---|---|
| `model_files` | reads and writes both |
| `layer_layout` | how a quantized layer is stored, and which numbers it stands for |
| `finite` | whether its numbers are numbers |
| `config_file` | the one writer of config.json |
| `skeleton`, `text_model`, `experts` | a model without its weights, under the names of its checkpoint |
| `stream` | rewrites a checkpoint a shard at a time |
| `compressed_tensors` | what vLLM does not read of an export, written anew |
"""
