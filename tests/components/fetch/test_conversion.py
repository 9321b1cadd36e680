"""What publishers store otherwise becomes the house's layout: number for number what transformers reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import decoders
import native
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from trimtab.base import child
from trimtab.base.errors import InputError
from trimtab.components.fetch import conversion, decoding, source
from trimtab.model.facts import inspect
from trimtab.model.headers import read_tensors
from trimtab.model.layouts import layout
from trimtab.runtime.checkpoint import model_files
from trimtab.store import open_store

EXPERTS, HIDDEN, NEURONS = 4, 64, 96
_SIZES = {
    "vocab_size": 300, "hidden_size": HIDDEN, "intermediate_size": NEURONS, "moe_intermediate_size": NEURONS,
    "shared_expert_intermediate_size": NEURONS, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "num_local_experts": EXPERTS,
    "num_experts": EXPERTS, "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def write(folder: Path, model_type: str) -> Path:
    """A random mixture of experts in bfloat16, biases and all, as transformers saves it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **_SIZES)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny._tokenizer().save_pretrained(folder)
    return folder


def converted(folder: Path, output: Path) -> dict[str, torch.Tensor]:
    output.mkdir()
    conversion.convert(str(folder), str(output))
    return {name: tensor for path in sorted(output.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, so that a zero below zero is another."""
    return one.dtype == other.dtype and torch.equal(one.view(torch.int16), other.view(torch.int16))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("block", [(32, 16), (64, 96), (1, 32), None])
def test_fp8_is_what_transformers_dequantises(block):
    draw = torch.Generator().manual_seed(0)
    weight, scale = native.fp8(torch.randn(64, 96, generator=draw), block)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    assert same(decoding.fp8(weight, scale, block), expected)


def test_fp8_blocks_at_the_end_are_smaller():
    """576 outputs in blocks of 128, as DeepSeek-V3's kv_a_proj_with_mqa, at an eighth: 72 in blocks of 16."""
    draw = torch.Generator().manual_seed(0)
    weight, scale = native.fp8(torch.randn(72, 40, generator=draw), (16, 16))
    assert scale.shape == (5, 3)
    found = decoding.fp8(weight, scale, (16, 16))
    for i, j in ((0, 0), (71, 39), (64, 31), (63, 32)):
        assert found[i, j] == (weight[i, j].float() * scale[i // 16, j // 16]).bfloat16()


def test_mxfp4_is_what_transformers_dequantises():
    """Every byte, under every scale that is a number."""
    blocks = torch.arange(256, dtype=torch.uint8).repeat(255, 1).reshape(1, 255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].expand(1, 255, 16).contiguous()
    expected = convert_moe_packed_tensors(blocks, scales)  # [E, inputs, outputs]
    assert same(decoding.mxfp4(blocks[0], scales[0]), expected[0].t().contiguous())


def test_a_scale_that_is_no_number_is_refused(tmp_path):
    folder = native.to_mxfp4(write(tmp_path / "model", "gpt_oss"))
    tensors = load_file(folder / native.WEIGHTS)
    tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 5, 1] = 255
    save_file(tensors, folder / native.WEIGHTS)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts\.down_proj_blocks holds NaN"):
        converted(folder, tmp_path / "out")


@pytest.mark.parametrize("precision", ["bfloat16", "mxfp4"])
def test_gpt_oss(tmp_path, precision):
    folder = write(tmp_path / "model", "gpt_oss")
    if precision == "mxfp4":
        native.to_mxfp4(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    found = converted(folder, tmp_path / "out")
    for n in range(2):
        name = f"model.layers.{n}.mlp.experts"
        gate_up, gate_up_bias = expected.pop(f"{name}.gate_up_proj"), expected.pop(f"{name}.gate_up_proj_bias")
        down, down_bias = expected.pop(f"{name}.down_proj"), expected.pop(f"{name}.down_proj_bias")
        for e in range(EXPERTS):
            expected |= {
                f"{name}.{e}.gate_proj.weight": gate_up[e, :, ::2].T,
                f"{name}.{e}.up_proj.weight": gate_up[e, :, 1::2].T,
                f"{name}.{e}.gate_proj.bias": gate_up_bias[e, ::2],
                f"{name}.{e}.up_proj.bias": gate_up_bias[e, 1::2],
                f"{name}.{e}.down_proj.weight": down[e].T,
                f"{name}.{e}.down_proj.bias": down_bias[e],
            }
    assert found.keys() == expected.keys()
    assert all(same(found[name], tensor.contiguous()) for name, tensor in expected.items())
    assert "quantization_config" not in config_of(tmp_path / "out")


def experts_of(expected: dict[str, torch.Tensor], transposed: bool) -> dict[str, torch.Tensor]:
    """A state dict of transformers with a matrix for each layer of each expert."""
    made = {}
    for name, tensor in expected.items():
        experts, _, part = name.rpartition(".")
        for e in range(EXPERTS if tensor.dim() == 3 and experts.endswith("experts") else 0):
            whole = tensor[e].T if transposed else tensor[e]
            halves = {"gate": whole[:NEURONS], "up": whole[NEURONS:]} if part == "gate_up_proj" else {"down": whole}
            made |= {f"{experts}.{e}.{half}_proj.weight": rows.contiguous() for half, rows in halves.items()}
    return made


@pytest.mark.parametrize(
    "model_type", ["llama4_text", "qwen3_5_moe_text", "qwen3_next", "granitemoe", "granitemoehybrid"]
)
def test_experts_in_one_tensor(tmp_path, model_type):
    folder = write(tmp_path / "model", model_type)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    if model_type.startswith("qwen"):
        native.stack(folder, EXPERTS)
    before = load_file(folder / native.WEIGHTS)
    found = converted(folder, tmp_path / "out")
    experts = experts_of(expected, transposed=model_type == "llama4_text")
    if model_type == "granitemoe":  # as vLLM reads Granite 3's
        mixtrals = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        experts = {re.sub(r"\w+_proj", lambda m: mixtrals[m[0]], name): tensor for name, tensor in experts.items()}
    assert len(experts) == 2 * EXPERTS * 3
    assert all(same(found[name], tensor) for name, tensor in experts.items())
    others = {name: tensor for name, tensor in found.items() if name not in experts}
    assert {*others} < {*before}
    assert all(torch.equal(tensor, before[name]) for name, tensor in others.items())
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("bare", [True, False], ids=["as published", "as transformers saves it"])
@torch.inference_mode()
def test_gpt2_is_the_gptbigcode_of_the_same_function(tmp_path, bare):
    folder = tmp_path / "model"
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=300)
    model = decoders.perturbed(AutoModelForCausalLM.from_config(config).eval()).bfloat16()
    model.save_pretrained(folder)
    tiny._tokenizer().save_pretrained(folder)
    if bare:  # OpenAI's own files name the body alone, and hold the masks of attention
        mask = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
        tensors = load_file(folder / native.WEIGHTS).items()
        named = {name.removeprefix("transformer."): tensor for name, tensor in tensors}
        save_file(named | mask, folder / native.WEIGHTS, {"format": "pt"})
    before = inspect(folder)
    converted(folder, tmp_path / "out")
    assert inspect(tmp_path / "out") == before and before.model_type == "gpt_bigcode"
    loaded, _ = model_files.load(tmp_path / "out", torch.float32)
    tokens = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    assert (loaded(tokens).logits - model.float()(tokens).logits).abs().max() <= 5e-4
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(read(tokens).logits, loaded(tokens).logits)
    assert not layout(folder, config_of(folder), read_tensors(folder)).as_stored


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, and scores by the block"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, r"stores its layers transposed \(Conv1D\)"),
    ],
)
def test_a_gpt2_that_is_another_is_refused(tmp_path, change, why):
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=1, n_head=4, n_positions=64, vocab_size=300)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of(tmp_path) | change))
    with pytest.raises(InputError, match=why):
        inspect(tmp_path)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_with_a_matrix_each_are_as_the_house_has_them(tmp_path, model_type):
    folder = write(tmp_path / "model", model_type)
    assert layout(folder, config_of(folder), read_tensors(folder)).as_stored


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_fp8_experts(tmp_path, model_type):
    """As MiniMax-M2 and Qwen3-…-FP8 publish theirs, router and all."""
    folder = write(tmp_path / "model", model_type)

    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if ".experts." not in name:
            return {name: tensor}
        weight, scale = native.fp8(tensor, (32, 32))
        return {name: weight, f"{name}_scale_inv": scale}

    settings = {"quant_method": "fp8", "weight_block_size": [32, 32], "modules_to_not_convert": ["lm_head", "gate"]}
    native.rewrite(folder, change, quantization_config=settings)
    stored = load_file(folder / native.WEIGHTS)
    found = converted(folder, tmp_path / "out")
    assert {*found} == {name for name in stored if "scale" not in name}
    for name, tensor in found.items():
        weight, scale = stored[name], stored.get(f"{name}_scale_inv")
        assert same(tensor, weight if scale is None else decoding.fp8(weight, scale, (32, 32)))


def gemma3(folder: Path) -> Path:
    """A tiny Gemma 3 with its tower: transformers 5 saves it under the prefixes of those before."""
    torch.manual_seed(0)
    text = {**_SIZES, "query_pre_attn_scalar": 16, "model_type": "gemma3_text"}
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_wrapper_under_old_prefixes(tmp_path):
    folder = gemma3(tmp_path / "model")
    names = {*load_file(folder / native.WEIGHTS)}
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in names
    expected = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    found = converted(folder, tmp_path / "out")
    assert {name.partition(".")[0] for name in found} <= {"model", "lm_head"}
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(same(tensor, model.state_dict()[name]) for name, tensor in expected.state_dict().items())


def test_a_large_model_is_written_in_shards(tmp_path, monkeypatch):
    folder = native.to_mxfp4(write(tmp_path / "model", "gpt_oss"))
    whole = converted(folder, tmp_path / "whole")
    monkeypatch.setattr(conversion, "SHARD_BYTES", 50_000)
    found = converted(folder, tmp_path / "out")
    assert len([*(tmp_path / "out").glob("model-*.safetensors")]) > 5
    assert found.keys() == whole.keys()
    assert all(same(found[name], tensor) for name, tensor in whole.items())
    assert {*read_tensors(tmp_path / "out")} == {*whole}  # the index promises each of them where it lies


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def here(monkeypatch):
    """Converts in this process, which has torch already."""
    monkeypatch.setattr(source, "call", lambda work, **arguments: conversion.convert(**arguments))


MADE = {
    "mixtral": ("mixtral", lambda folder: folder),
    "mixtral in FP8": ("mixtral", native.to_fp8),
    "qwen3_moe": ("qwen3_moe", lambda folder: folder),
    "qwen3_moe in one tensor": ("qwen3_moe", lambda folder: native.stack(folder, EXPERTS)),
    "gpt_oss": ("gpt_oss", lambda folder: folder),
    "gpt_oss in MXFP4": ("gpt_oss", native.to_mxfp4),
    "llama4_text": ("llama4_text", lambda folder: folder),
}


@pytest.mark.parametrize(("model_type", "made"), MADE.values(), ids=MADE)
def test_planning_reads_from_headers_what_is_fetched(tmp_path, store, here, model_type, made):
    """And what is fetched gives the logits that transformers gives of the source."""
    folder = made(write(tmp_path / "model", model_type))
    facts = source.facts(str(folder))
    tree = source.fetch(str(folder), store)
    assert inspect(store.get(tree)) == facts
    assert store.manifest(tree).metadata["facts"] == facts.model_dump(mode="json")
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert (facts.experts, facts.dtype) == (EXPERTS, "bfloat16")
    assert facts.parameters == sum(parameter.numel() for parameter in expected.parameters())
    assert facts.bytes == 2 * facts.parameters
    tokens = torch.arange(40)[None] * 7 % 300
    found = model_files.load(store.get(tree), torch.float32)[0]
    with torch.inference_mode():
        torch.testing.assert_close(found(tokens).logits, expected.float()(tokens).logits, atol=5e-4, rtol=0)


@pytest.mark.parametrize("made", [lambda folder: folder, native.to_mxfp4], ids=["bfloat16", "mxfp4"])
def test_an_expert_too_many_is_refused_before_anything_is_converted(tmp_path, made):
    folder = made(write(tmp_path / "model", "gpt_oss"))
    native.rewrite(folder, lambda name, tensor: {name: tensor}, num_local_experts=EXPERTS - 1)
    with pytest.raises(InputError, match=r"num_local_experts is 3, and block 0 has .* of 4 experts"):
        source.check(str(folder))


@pytest.fixture
def qwen3(tmp_path) -> Path:
    return tiny.write_model(tmp_path / "model", family="qwen3")


@pytest.mark.parametrize("block", [(32, 32), None])
def test_an_fp8_source_is_fetched_as_bfloat16(qwen3, store, block, capsys):
    plain = inspect(qwen3)
    native.to_fp8(qwen3, block)
    assert inspect(qwen3) == source.facts(str(qwen3)) == plain
    expected = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.bfloat16).state_dict()
    tree = source.fetch(str(qwen3), store)
    manifest = store.manifest(tree)
    assert manifest.metadata["facts"] == plain.model_dump(mode="json")
    scaled = "block scales of 32 x 32" if block else "one scale a tensor"
    said = f"the source is FP8 with {scaled}; it is dequantised to BF16"
    assert manifest.metadata["converted"] == [said]
    assert said in capsys.readouterr().err
    folder = store.get(tree)
    assert inspect(folder) == plain
    assert config_of(qwen3) == config_of(folder) | {"quantization_config": config_of(qwen3)["quantization_config"]}
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert all(same(found[name], tensor) for name, tensor in expected.items())


def test_a_source_is_converted_once(qwen3, store, tmp_path, monkeypatch):
    native.to_fp8(qwen3)
    tree = source.fetch(str(qwen3), store)
    monkeypatch.setattr(source, "call", lambda *a, **b: pytest.fail("converted again"))
    assert source.fetch(str(qwen3), store) == tree
    other = open_store(str(tmp_path / "other"))
    assert source.fetch(tree.uri, other).digest == tree.digest  # what was said of it goes along


def test_a_plain_source_is_stored_as_it_is(qwen3, store, monkeypatch):
    monkeypatch.setattr(child, "call", lambda *a, **b: pytest.fail("rewritten"))
    manifest = store.manifest(source.fetch(str(qwen3), store))
    assert "converted" not in manifest.metadata
    assert (store.get(source.fetch(str(qwen3), store)) / native.WEIGHTS).read_bytes() == (
        qwen3 / native.WEIGHTS
    ).read_bytes()


@torch.inference_mode()
def test_bloom_as_it_is_published(tmp_path: Path) -> None:
    folder = decoders.write(tmp_path / "bloom", "bloom")
    path = folder / "model.safetensors"
    save_file({name.removeprefix("transformer."): t for name, t in load_file(path).items()}, path, {"format": "pt"})
    tensors = converted(folder, tmp_path / "converted")
    assert all(name.startswith("transformer.") for name in tensors)
    assert inspect(tmp_path / "converted") == inspect(folder)
    model, _ = model_files.load(tmp_path / "converted", torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([[3, 4, 5, 6]])
    assert torch.allclose(model(tokens).logits, reference(tokens).logits, atol=1e-5)


def test_a_body_alone_is_told_how_it_gets_its_head(tmp_path: Path) -> None:
    """And as it is told, it is let pass."""
    folder = decoders.write(tmp_path / "bare", "gpt_bigcode")
    path = folder / "model.safetensors"
    save_file({name.removeprefix("transformer."): t for name, t in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(InputError, match=r"name their blocks h\.…, as a model without its output head.*save_pre"):
        inspect(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "whole")
    tiny._tokenizer().save_pretrained(tmp_path / "whole")
    assert inspect(tmp_path / "whole").layers == decoders.LAYERS
