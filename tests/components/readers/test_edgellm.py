"""NVIDIA's own reader of ModelOpt's checkpoints, TensorRT Edge-LLM, on exports: it takes each tensor, and skips none.

It reads on a CPU, and runs on other devices than there are here. It has modules of its own for each family that it
knows, so names, shapes, scales and exclusions are compared with what NVIDIA's code expects.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from trimtab.catalog.formats import FORMATS
from trimtab.model.facts import inspect
from trimtab.runtime.checkpoint.model_files import Export

loader = pytest.importorskip(
    "tensorrt_edgellm.checkpoint.loader", reason="tensorrt-edgellm has wheels for Linux, and for Python up to 3.12"
)

#: What it calls ModelOpt's names of formats.
TYPES = {"FP8": "fp8", "NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4_a16", "W4A16_AWQ": "int4_awq_modelopt",
         "W8A8_SQ_PER_CHANNEL": "int8_sq"}  # fmt: skip
#: Its kernels of INT4 take 64 inputs and outputs at a time.
WIDE = {"hidden_size": 128, "head_dim": 32}


@pytest.fixture
def auto_model():
    """Its reader with the families that it has modules for; its own list of them asks for ONNX."""
    from tensorrt_edgellm import model
    from tensorrt_edgellm.models.nemotron_h.modeling_nemotron_h import NemotronHCausalLM
    from tensorrt_edgellm.models.qwen3_5.modeling_qwen3_5_text import Qwen3_5CausalLM
    from tensorrt_edgellm.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeCausalLM

    known = {"qwen3_moe": Qwen3MoeCausalLM, "qwen3_5_text": Qwen3_5CausalLM, "nemotron_h": NemotronHCausalLM}
    for model_type, of_type in known.items():
        model.register_model(model_type, of_type, model.standard_attention_scale)
    return model.AutoModel


def as_published(export: Path, folder: Path) -> Path:
    """An export of Nemotron-H with the fields that its published config.json has and transformers 5 does not write."""
    shutil.copytree(export, folder)
    path = folder / "config.json"
    letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
    config = json.loads(path.read_text())
    kinds = config["layers_block_type"]
    said = {"num_hidden_layers": len(kinds), "hybrid_override_pattern": "".join(letters[kind] for kind in kinds)}
    path.write_text(json.dumps(config | said))
    return folder


@pytest.mark.parametrize(
    ("model_type", "form", "kv_cache", "changes"),
    [
        ("llama", "fp8", "fp8", {}),
        ("llama", "int8_sq", "none", {}),
        ("qwen3", "nvfp4", "none", {}),
        ("qwen3", "int4_rtn", "none", WIDE),
        ("qwen3_moe", "nvfp4", "none", {}),
        ("qwen3_moe", "int4_rtn", "none", {**WIDE, "moe_intermediate_size": 64}),
        ("qwen3_5_text", "fp8", "none", {}),
        ("qwen3_5_text", "nvfp4", "none", {}),
        ("nemotron_h", "fp8", "none", {}),
        ("nemotron_h", "nvfp4", "none", {}),
        # FP4 weights that meet 16 bits it knows as parts of a mix, in this family.
        ("nemotron_h", "mixed_gpu", "none", {}),
        ("nemotron_h", "mixed_fp4", "none", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_tensor_is_taken(
    model_type, form, kv_cache, changes, exported, auto_model, caplog, monkeypatch, tmp_path
) -> None:
    from tensorrt_edgellm.config import _normalize_module_name, module_quant_type
    from tensorrt_edgellm.model import load_model_config

    folder, source, _ = exported(model_type, form, kv_cache, **changes)
    if model_type == "nemotron_h":
        folder = as_published(folder, tmp_path / "published")
    export = Export(folder)
    taken: dict[str, bool] = {}
    put = loader._set_tensor

    def spy(model, name, tensor, **settings):
        taken[name] = put(model, name, tensor, **settings)
        return taken[name]

    monkeypatch.setattr(loader, "_set_tensor", spy)
    config = load_model_config(str(folder))
    with caplog.at_level(logging.DEBUG, logger="tensorrt_edgellm"):
        auto_model.from_pretrained(str(folder), low_cpu_mem_usage=True)  # raises where one of its own stays empty
    assert f"Loaded {len(export.names)} tensors, skipped 0 " in caplog.text
    assert taken.keys() == set(export.names) and all(taken.values())
    own = (record for record in caplog.records if record.name.startswith("tensorrt_edgellm"))
    assert [record.getMessage() for record in own if record.levelno >= logging.WARNING] == []
    # How it would multiply each layer: what is quantized, and what is left out, routers among it.
    layers = {*(layer.name for layer in inspect(source).linears), *export.plain_layers}
    said = {name: module_quant_type(_normalize_module_name(name), config) for name in layers}
    algos = {name: export.layer(name).layout.algo for name in export.layers}
    assert said == {name: TYPES[algos[name]] if name in algos else "fp16" for name in layers}
    assert (len({*algos.values()}) > 1) == bool(FORMATS[form].mixes)
    assert config.quant.kv_cache_quant == (None if kv_cache == "none" else kv_cache)
