"""Quantization: a checkpoint, shard by shard, becomes one as NVIDIA's ModelOpt exports it."""
