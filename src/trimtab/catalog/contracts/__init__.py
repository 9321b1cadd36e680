"""TensorRT-LLM's interfaces as data: which version has which back end, and which arguments."""
