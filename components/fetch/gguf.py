"""GGUF to an ordinary checkpoint: transformers reads and dequantises it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.runtime import checkpoint as checkpoints


def convert(path: str, output: str) -> None:
    """Writes the GGUF file's model as bfloat16 safetensors with config and tokenizer."""
    file = Path(path)
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    # The weights are plain numbers now; with these marks left, save_pretrained would ask a quantizer that is gone.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.config.architectures = [type(model).__name__]
    checkpoints.save(model, AutoTokenizer.from_pretrained(**where), Path(output))
