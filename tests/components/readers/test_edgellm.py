"""NVIDIA's own reader of ModelOpt's checkpoints, TensorRT Edge-LLM, on exports: it takes each tensor, and skips none.

It reads on a CPU and runs on other devices than there are here. Where it knows a family it has modules of its own for
it, so names, shapes, scales and exclusions are all compared with what NVIDIA's code expects.
"""

from __future__ import annotations

import logging
import re

import pytest
from safetensors import safe_open

from trimtab import families
from trimtab.model.facts import inspect
from trimtab.runtime.checkpoint.model_files import Export

edgellm = pytest.importorskip("tensorrt_edgellm.model", reason="tensorrt-edgellm has wheels for Linux and Python to 3.12")

#: Its names of formats.
QUANT_TYPES = {"fp8": "fp8", "nvfp4": "nvfp4", "int4_awq": "int4_awq_modelopt", "int8_sq": "int8_sq"}


@pytest.mark.parametrize(
    ("model_type", "form", "kv_cache"),
    [
        ("llama", "fp8", "fp8"),
        ("llama", "int8_sq", "none"),
        ("qwen3", "nvfp4", "none"),
        ("qwen3", "int4_awq", "none"),
        ("qwen3_moe", "nvfp4", "none"),
        ("qwen3_moe", "int4_awq", "none"),
        ("qwen3_5_text", "fp8", "none"),
        ("qwen3_5_text", "nvfp4", "none"),
        ("nemotron_h", "fp8", "none"),
    ],
)
def test_each_tensor_is_taken(model_type, form, kv_cache, exported, caplog) -> None:
    from tensorrt_edgellm.config import module_quant_type
