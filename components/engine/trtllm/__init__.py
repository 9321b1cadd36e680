"""What TensorRT-LLM's engine builder needs on disk, up to 1.2.1."""
