"""NVIDIA's own reader of ModelOpt's checkpoints, TensorRT Edge-LLM, on exports: it takes each tensor, and skips none.

It reads on a CPU, and runs on other devices than there are here. It has modules of its own for each family that it
knows, so names, shapes, scales and exclusions are compared with what NVIDIA's code expects.
"""

from __future__ import annotations

import logging

import pytest

from trimtab.model.facts import inspect
from trimtab.runtime.checkpoint.model_files import Export

loader = pytest.importorskip(
    "tensorrt_edgellm.checkpoint.loader", reason="tensorrt-edgellm has wheels for Linux, and for Python up to 3.12"
)

#: What it calls our formats.
TYPES = {"fp8": "fp8", "nvfp4": "nvfp4", "int4_awq": "int4_awq_modelopt", "int8_sq": "int8_sq"}


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
def test_each_tensor_is_taken(model_type, form, kv_cache, exported, caplog, monkeypatch) -> None:
    from tensorrt_edgellm.config import _normalize_module_name, module_quant_type
    from tensorrt_edgellm.model import AutoModel, load_model_config

    export = Export(exported(model_type, form, kv_cache).folder)
    taken: dict[str, bool] = {}
    put = loader._set_tensor

    def spy(model, name, tensor, **settings):
        taken[name] = put(model, name, tensor, **settings)
        return taken[name]

    monkeypatch.setattr(loader, "_set_tensor", spy)
    config = load_model_config(str(export.folder))
    with caplog.at_level(logging.DEBUG, logger="tensorrt_edgellm"):
        AutoModel.from_pretrained(str(export.folder), low_cpu_mem_usage=True)  # raises where one of its own stays empty
    assert f"Loaded {len(export.names)} tensors, skipped 0 " in caplog.text
    assert taken.keys() == set(export.names) and all(taken.values())
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    # How it would multiply each layer: what is quantized, and what is left out, routers among it.
    said = {layer.name: module_quant_type(_normalize_module_name(layer.name), config)
            for layer in inspect(export.folder).linears}  # fmt: skip
    assert said == {name: TYPES[form] if name in export.layers else "fp16" for name in said}
    plain = [module_quant_type(_normalize_module_name(name), config) for name in export.plain_layers]
    assert set(plain) == {"fp16"}
    assert config.quant.kv_cache_quant == (None if kv_cache == "none" else kv_cache)
