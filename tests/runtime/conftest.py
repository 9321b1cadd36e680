"""A tiny random Llama, and its ModelOpt exports: what the runtime's tests run on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCABULARY = 128

#: Format -> ModelOpt's configuration and the group size (INT4).
FORMATS = {
    "int8_wo": ("INT8_WEIGHT_ONLY_CFG", 0),
    "int8_sq": ("INT8_SMOOTHQUANT_CFG", 0),
    "fp8": ("FP8_DEFAULT_CFG", 0),
    "fp8_kv": ("FP8_DEFAULT_CFG", 0),
    "int4_rtn_g32": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", 32),
    "int4_awq_g32": ("INT4_AWQ_CFG", 32),
    "int4_awq_g64": ("INT4_AWQ_CFG", 64),
    "mixed": ("", 32),
}


@dataclass(frozen=True)
class Exported:
    """An export, and the fake-quantized model in float32 that it was made from."""

    folder: Path
    reference: PreTrainedModel


def tiny_llama(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """Two layers, grouped-query attention, tied embeddings; weights large enough to disagree about tokens."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).to(dtype).eval()


@pytest.fixture(scope="session")
def tiny() -> Any:
    """`tiny_llama`, for models of other settings."""
    return tiny_llama


@pytest.fixture(scope="session")
def windows() -> torch.Tensor:
    """Random tokens, int64 [6, 24]."""
    return torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def original() -> LlamaForCausalLM:
    """The model that every export was made from, in float32."""
    return tiny_llama()


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny_llama(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, windows: torch.Tensor) -> Any:
    """A function: format -> Exported, made once a session."""
    made: dict[str, Exported] = {}

    def make(name: str) -> Exported:
        if name not in made:
            made[name] = _export(name, tmp_path_factory.mktemp(name), windows)
        return made[name]

    return make


def _export(name: str, folder: Path, windows: torch.Tensor) -> Exported:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

    def run(model: PreTrainedModel) -> None:
        with torch.inference_mode():
            model(windows)

    model = mtq.quantize(tiny_llama(), _configuration(name), run)
    reference = copy.deepcopy(model)  # exporting packs the weights of the model it is given
    requantize_resmooth_fused_llm_layers(reference)  # and first unites the scales of q, k, v and of gate, up
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=folder)
    return Exported(folder, reference)


def _configuration(name: str) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq

    preset, group_size = FORMATS[name]
    if name == "mixed":
        int4 = {"num_bits": 4, "block_sizes": {-1: group_size}}
        int8 = {"num_bits": 8, "axis": 0}
        entries = [{"quantizer_name": "*", "enable": False}]
        entries += [{"quantizer_name": "*layers.0*weight_quantizer", "cfg": int4, "enable": True}]
        entries += [{"quantizer_name": "*layers.1*weight_quantizer", "cfg": int8, "enable": True}]
        return {"quant_cfg": entries, "algorithm": "max"}
    config = copy.deepcopy(getattr(mtq, preset))
    for entry in config["quant_cfg"]:
        blocks = entry["cfg"].get("block_sizes") if isinstance(entry.get("cfg"), dict) else None
        if blocks and -1 in blocks:
            blocks[-1] = group_size
    if name == "fp8_kv":
        config["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    return config
