"""Quantization: through NVIDIA's ModelOpt, exported as a unified Hugging Face checkpoint."""
