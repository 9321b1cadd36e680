"""How what a source stores becomes the house's layout, and what is refused: from made-up headers, without weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from trimtab.base.errors import InputError
from trimtab.model.facts import facts_of
from trimtab.model.headers import DTYPE_BYTES, Tensor
from trimtab.model.layouts import Layout, layout
from trimtab.model.low_precision import undeclared
from trimtab.model.outline import outline

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
MXFP4 = {"model_type": "gpt_oss", "hidden_size": 64, "quantization_config": {"quant_method": "mxfp4"}}
Q = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = "model.layers.0.mlp.experts"


def read(folder: Path, config: Mapping[str, Any], stored: Mapping[str, tuple[str, list[int]]]) -> Layout:
    sizes = {name: math.prod(shape) * DTYPE_BYTES[dtype] for name, (dtype, shape) in stored.items()}
    tensors = {name: Tensor(name, dtype, (*shape,), 0, sizes[name]) for name, (dtype, shape) in stored.items()}
    return layout(folder, config, tensors)


def shapes(found: Layout) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in found.tensors.items()}


def test_a_plain_source_is_as_stored(tmp_path):
    found = read(tmp_path, {"model_type": "llama"}, {Q: ("BF16", [8, 8]), "lm_head.weight": ("F32", [4, 8])})
    assert found.as_stored
    assert {name: tensor.dtype for name, tensor in found.tensors.items()} == {Q: "BF16", "lm_head.weight": "F32"}


@pytest.mark.parametrize("scale", ["weight_scale_inv", "weight_scale"])
def test_fp8_with_block_scales_is_bfloat16(tmp_path, scale):
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 outputs, which are four and a half blocks of 128."""
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa"
    stored = {f"{name}.weight": ("F8_E4M3", [576, 7168]), f"{name}.{scale}": ("F32", [5, 56])}
    found = read(tmp_path, FP8, stored)
    assert shapes(found) == {f"{name}.weight": (576, 7168)}
    tensor = found.tensors[f"{name}.weight"]
    assert (tensor.dtype, tensor.end - tensor.begin) == ("BF16", 576 * 7168 * 2)
    assert found.sentences == ("the source is FP8 with block scales of 128 x 128; it is dequantised to BF16",)


def test_fp8_with_one_scale_a_tensor_leaves_scales_of_activations_out(tmp_path):
    """Ministral 3: weight_block_size is null, activation_scheme static."""
    module = Q.removesuffix(".weight")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
    stored = {Q: ("F8_E4M3", [8, 8]), f"{Q}_scale_inv": ("BF16", []), f"{module}.activation_scale": ("BF16", [])}
    found = read(tmp_path, config, stored)
    assert (*found.tensors,) == (Q,)
    assert found.left_out == (f"{module}.activation_scale",)
    assert "one scale a tensor" in found.sentences[0]


GATE_UP = {f"{EXPERTS}.{e}.{part}_proj.weight": (96, 64) for e in range(2) for part in ("gate", "up")}
DOWN = {f"{EXPERTS}.{e}.down_proj.weight": (64, 96) for e in range(2)}
BIASES = {f"{EXPERTS}.{e}.{part}_proj.bias": (96,) for e in range(2) for part in ("gate", "up")}
BIASES |= {f"{EXPERTS}.{e}.down_proj.bias": (64,) for e in range(2)}
STACKED = [
    ("qwen3_5_moe_text", {"gate_up_proj": [2, 192, 64], "down_proj": [2, 64, 96]}, GATE_UP | DOWN),
    ("qwen3_next", {"gate_up_proj.weight": [2, 192, 64], "down_proj.weight": [2, 64, 96]}, GATE_UP | DOWN),
    ("llama4_text", {"gate_up_proj": [2, 64, 192], "down_proj": [2, 96, 64]}, GATE_UP | DOWN),
    (
        "gpt_oss",
        {
            "gate_up_proj": [2, 64, 192],
            "down_proj": [2, 96, 64],
            "gate_up_proj_bias": [2, 192],
            "down_proj_bias": [2, 64],
        },
        GATE_UP | DOWN | BIASES,
    ),
]


@pytest.mark.parametrize(("model_type", "stored", "expected"), STACKED, ids=[case[0] for case in STACKED])
def test_experts_in_one_tensor_become_matrices(tmp_path, model_type, stored, expected):
    config = {"model_type": model_type, "hidden_size": 64, "num_local_experts": 2}
    found = read(tmp_path, config, {f"{EXPERTS}.{name}": ("BF16", shape) for name, shape in stored.items()})
    assert shapes(found) == expected
    rows = found.pieces[f"{EXPERTS}.1.up_proj.weight"].rows
    assert rows == ((1, 192, 2) if model_type == "gpt_oss" else (96, 192, 1))


def test_granites_experts(tmp_path):
    block = "model.layers.0.block_sparse_moe"
    stored = {
        f"{block}.input_linear.weight": ("BF16", [2, 192, 64]),
        f"{block}.output_linear.weight": ("BF16", [2, 64, 96]),
        f"{block}.router.layer.weight": ("BF16", [2, 64]),
        "model.layers.0.shared_mlp.input_linear.weight": ("BF16", [192, 64]),  # no experts: it stays
    }
    found = read(tmp_path, {"model_type": "granitemoehybrid", "hidden_size": 64, "num_local_experts": 2}, stored)
    assert {name for name in found.tensors if "experts" not in name} == {*stored} - {*list(stored)[:2]}
    assert shapes(found)[f"{block}.experts.1.gate_proj.weight"] == (96, 64)


def test_the_experts_of_a_wrapper_are_those_of_its_text_model(tmp_path):
    """Llama 4 Scout: transformers 5 has the old prefix itself."""
    experts = "language_model.model.layers.0.feed_forward.experts"
    config = {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "hidden_size": 64}}
    found = read(tmp_path, config, {f"{experts}.down_proj": ("BF16", [2, 96, 64])})
    assert shapes(found) == {f"{experts}.{n}.down_proj.weight": (64, 96) for n in range(2)}


def test_mxfp4(tmp_path):
    """64 outputs of 96 inputs: three groups of 32, 16 bytes each."""
    stored = {f"{EXPERTS}.down_proj_blocks": ("U8", [2, 64, 3, 16]), f"{EXPERTS}.down_proj_scales": ("U8", [2, 64, 3])}
    found = read(tmp_path, MXFP4, stored)
    assert shapes(found) == DOWN
    assert not any(piece.transposed for piece in found.pieces.values())
    assert found.sentences[0] == "the source is MXFP4 in its experts; they are dequantised to BF16"


def gpt_oss(layers: int, experts: int) -> tuple[dict[str, Any], dict[str, tuple[str, list[int]]]]:
    """The config and the headers of gpt-oss as OpenAI publishes them on the hub (openai/gpt-oss-20b, gpt-oss-120b)."""
    hidden, heads, keys = 2880, 64 * 64, 8 * 64
    config = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_hidden_layers": layers,
        "hidden_size": hidden, "intermediate_size": hidden, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 201088, "max_position_embeddings": 131072, "num_local_experts": experts,
        "num_experts_per_tok": 4, "tie_word_embeddings": False, "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    plain = {"model.embed_tokens.weight": [201088, hidden], "lm_head.weight": [201088, hidden]}
    plain["model.norm.weight"] = [hidden]
    blocks = {}
    for n in range(layers):
        block = f"model.layers.{n}"
        for name, rows in {"q": heads, "k": keys, "v": keys}.items():
            plain[f"{block}.self_attn.{name}_proj.weight"] = [rows, hidden]
            plain[f"{block}.self_attn.{name}_proj.bias"] = [rows]
        plain |= {f"{block}.self_attn.o_proj.weight": [hidden, heads], f"{block}.self_attn.o_proj.bias": [hidden]}
        plain |= {f"{block}.{norm}_layernorm.weight": [hidden] for norm in ("input", "post_attention")}
        plain |= {f"{block}.self_attn.sinks": [64], f"{block}.mlp.router.bias": [experts]}
        plain[f"{block}.mlp.router.weight"] = [experts, hidden]
        for name, rows in {"gate_up": 2 * hidden, "down": hidden}.items():
            experts_in = f"{block}.mlp.experts.{name}_proj"
            plain[f"{experts_in}_bias"] = [experts, rows]
            blocks[f"{experts_in}_blocks"] = [experts, rows, hidden // 32, 16]
            blocks[f"{experts_in}_scales"] = [experts, rows, hidden // 32]
    return config, {name: ("BF16", shape) for name, shape in plain.items()} | {
        name: ("U8", shape) for name, shape in blocks.items()
    }


@pytest.mark.parametrize(("layers", "experts", "billions"), [(24, 32, 20.91), (36, 128, 116.83)], ids=["20b", "120b"])
def test_the_facts_of_gpt_oss_from_its_headers(tmp_path, layers, experts, billions):
    """Parameters by OpenAI's model card (arXiv 2508.10925, table 1)."""
    config, stored = gpt_oss(layers, experts)
    facts = facts_of(tmp_path, config, read(tmp_path, config, stored).tensors)
    assert round(facts.parameters / 1e9, 2) == billions
    assert (facts.bytes, facts.dtype) == (2 * facts.parameters, "bfloat16")


OLD = [
    ("language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
    ("language_model.lm_head.weight", "lm_head.weight"),
    ("vision_tower.vision_model.post_layernorm.bias", "model.vision_tower.vision_model.post_layernorm.bias"),
    ("multi_modal_projector.linear_1.weight", "model.multi_modal_projector.linear_1.weight"),
]


@pytest.mark.parametrize(("old", "new"), OLD, ids=[case[1] for case in OLD])
def test_old_prefixes_of_wrappers(tmp_path, old, new):
    config = {"model_type": "gemma3", "text_config": {}}
    assert (*read(tmp_path, config, {old: ("BF16", [4, 4])}).tensors,) == (new,)
    assert read(tmp_path, config, {new: ("BF16", [4, 4])}).as_stored


@pytest.mark.parametrize("name", ["h.0.mlp.dense_h_to_4h.weight", "word_embeddings.weight",
                                  "word_embeddings_layernorm.bias", "ln_f.weight"])  # fmt: skip
def test_bloom_is_published_without_the_name_of_its_body(tmp_path, name):
    whole = f"transformer.{name}"
    assert (*read(tmp_path, {"model_type": "bloom"}, {name: ("F16", [4])}).tensors,) == (whole,)
    assert read(tmp_path, {"model_type": "bloom"}, {whole: ("F16", [4])}).as_stored


def moe(**changes: tuple[str, list[int]]) -> dict[str, tuple[str, list[int]]]:
    whole = {f"{EXPERTS}.{n}.up_proj.weight": ("BF16", [8, 8]) for n in range(3)}
    return whole | {f"{EXPERTS}.{name}": tensor for name, tensor in changes.items()}


BLOCKS, SCALES = f"{EXPERTS}.down_proj_blocks", f"{EXPERTS}.down_proj_scales"
WEIGHT = {Q: ("F8_E4M3", [256, 256])}
PLAIN = {Q: ("BF16", [256, 256])}
SCALE = {f"{Q}_scale_inv": ("F32", [2, 2])}
BAD = [
    ("no scale", FP8, WEIGHT, "q_proj.weight_scale_inv is missing, the scale of"),
    ("a transposed scale", FP8, WEIGHT | {f"{Q}_scale_inv": ("F32", [2, 3])}, "asks for F32 [2, 2] (blocks of 128 x"),
    ("a scale of another type", FP8, WEIGHT | {f"{Q}_scale_inv": ("U8", [2, 2])}, "is U8 [2, 2], and"),
    ("two scales", FP8, WEIGHT | SCALE | {f"{Q}_scale": ("F32", [2, 2])}, "are both scales of"),
    ("a dense weight beside its scale", FP8, {"x": ("F8_E4M3", [128, 128]), "x_scale_inv": ("F32", [1, 1])} | PLAIN
        | SCALE, "is the scale of a weight in FP8, and model.layers.0.self_attn.q_proj.weight is BF16"),
    ("a scale without a weight", FP8, {"x": ("F8_E4M3", [128, 128]), "x_scale_inv": ("F32", [1, 1])} | SCALE,
        "there is no model.layers.0.self_attn.q_proj.weight"),
    ("nothing in FP8", FP8, PLAIN, "quantization_config says 'fp8', and no tensor is stored so; remove the field"),
    ("FP8 that the config conceals", {}, WEIGHT | SCALE, "there is no quantization_config, and"),
    ("E5M2", FP8, WEIGHT | SCALE | {"x": ("F8_E5M2", [4, 4])}, "and x is F8_E5M2"),
    ("blocks of no size", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}}, WEIGHT,
        "weight_block_size of config.json is [128, 0], and the sizes of a block are two whole numbers"),
    ("no scales", MXFP4, {BLOCKS: ("U8", [2, 64, 3, 16])}, "down_proj_scales is missing"),
    ("blocks of another size", MXFP4, {BLOCKS: ("U8", [2, 64, 3, 8]), SCALES: ("U8", [2, 64, 3])},
        "is U8 [2, 64, 3, 8], and MXFP4 is U8 [experts, outputs, groups, 16]"),
    ("scales of another shape", MXFP4, {BLOCKS: ("U8", [2, 64, 3, 16]), SCALES: ("U8", [2, 64, 2])},
        "its blocks ask for U8 [2, 64, 3]"),
    ("scales alone", MXFP4, {BLOCKS: ("U8", [2, 64, 3, 16]), SCALES: ("U8", [2, 64, 3]), "x_scales": ("U8", [2])},
        "quantization_config says 'mxfp4', and x_scales is U8"),
    ("both copies", MXFP4, {BLOCKS: ("U8", [2, 64, 3, 16]), SCALES: ("U8", [2, 64, 3]),
        f"{EXPERTS}.down_proj": ("BF16", [2, 96, 64])}, "are both model.layers.0.mlp.experts.0.down_proj.weight"),
    ("an expert twice", {"hidden_size": 8}, moe(up_proj=("BF16", [3, 8, 8])), "are both"),
    ("half an expert", {}, moe(**{"0.down_proj.weight": ("BF16", [8, 8])}), "experts.1.down_proj.weight is not as"),
    ("one of another shape", {}, moe(**{"2.up_proj.weight": ("BF16", [8, 9])}), "experts.2.up_proj.weight is not as"),
    ("experts the other way round", {"model_type": "qwen3_5_moe_text", "hidden_size": 64},
        {f"{EXPERTS}.gate_up_proj": ("BF16", [2, 64, 192])}, "which is none of the experts of a 'qwen3_5_moe_text'"),
    ("both prefixes", {"model_type": "gemma3"}, {name: ("BF16", [4]) for name in OLD[0]}, "are both model.language"),
    ("INT4 (Kimi K2)", {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        {}, "quantization_config of config.json, 'compressed-tensors' in the form 'pack-quantized', says that it is"),
    ("inside a wrapper", {"text_config": {"quantization_config": {"quant_method": "awq"}}}, {},
        "text_config.quantization_config of config.json, 'awq' says that it is already quantized; give the 16-bit"),
    ("a list", {"quantization_config": ["fp8"]}, {}, "quantization_config of config.json says that it is already"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "stored", "said"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_is_refused(tmp_path, config, stored, said):
    with pytest.raises(InputError) as error:
        read(tmp_path, config, stored)
    assert said in str(error.value)


def test_a_config_alone_is_refused_for_its_form(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 64,
        "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    plain = outline(path)
    path.write_text(json.dumps(config | FP8))
    assert outline(path) == plain
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="'gptq' says that it is already quantized"):
        outline(path)


def test_a_config_says_no_more_of_what_is_undone():
    config = {"a": 1, **FP8, "text_config": {"b": 2, **FP8}}
    assert undeclared(config) == {"a": 1, "text_config": {"b": 2}}
