"""Layers that read one input become one product, and every number stays what it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trimtab.catalog.formats import STORAGES
from trimtab.families.llama import LLAMA
from trimtab.recipe import Engine
from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.layer_layout import Layout, Quantized
from trimtab.runtime.decoder.assemble import assemble
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.linear import choice, fused
from trimtab.runtime.linear.fused import FusedPart

CPU = torch.device("cpu")
#: Four products of two blocks: q, k, v and gate, up.
PRODUCTS = 4


@pytest.mark.parametrize(
    "name", ["bf16", "int8_wo", "int8_sq", "fp8", "fp8_kv", "int4_awq_g32", "int4_rtn_g32", "mixed"]
)
@torch.inference_mode()
def test_logits_stay(name: str, plain_folder: Path, exported: Any, windows: torch.Tensor) -> None:
    folder = plain_folder if name == "bf16" else exported(name).folder
    one, many = assemble(folder, CPU), assemble(folder, CPU, fuse=False)
    products = {module.product for module in one.modules() if isinstance(module, FusedPart)}
    assert len(products) == PRODUCTS
    assert not any(isinstance(module, FusedPart) for module in many.modules())
    for tokens in (windows, windows[:1, :3]):  # packed and dense products
        found, expected = one(tokens).logits.float(), many(tokens).logits.float()
        assert (found - expected).norm() <= 0.01 * expected.norm()
        assert torch.equal(found.argmax(-1), expected.argmax(-1)) or name in ("bf16", "mixed", "fp8", "fp8_kv")


def test_kernels_are_told_of_each_layer(exported: Any) -> None:
    engine = TorchEngine(exported("int8_wo").folder, Engine(), "cpu")
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    expected = {"kernel": "_weight_int8pack_mm", "emulated": False}
    assert engine.kernels() == {f"model.layers.{i}.{name}": expected for i in range(2) for name in names}


def test_weights_are_held_once(plain_folder: Path) -> None:
    whole = sum(p.nbytes for p in assemble(plain_folder, CPU, fuse=False).parameters())
    assert sum(p.nbytes for p in assemble(plain_folder, CPU).parameters()) == whole


def layers(algo: str, group: int = 0, **changes: Any) -> list[Quantized]:
    """Three layers as ModelOpt stores them, of 32, 16 and 16 outputs and 64 inputs."""
    torch.manual_seed(0)
    found = []
    layout = Layout(algo, group)
    storage = layout.storage
    for rows in (32, 16, 16):
        shape = {"out": (rows // 2, 64), "in": (rows, 32)}.get(storage.number.packed, (rows, 64))
        weight = torch.randint(0, 255, shape, dtype=torch.uint8)
        floating = layout.dtype.is_floating_point
        weight = ((weight.float() - 128) / 16).to(layout.dtype) if floating else weight.view(layout.dtype)
        scale = torch.rand(rows, 64 // group) + 0.5 if group else torch.rand(rows) + 0.5
        scale = torch.tensor(0.5) if storage.scale == "tensor" else scale
        if storage.scale_type == "e8m0":
            scale = (127 * torch.ones_like(scale)).to(torch.uint8)
        elif storage.scale_type == "e4m3":
            scale = scale.to(torch.float8_e4m3fn)
        given = {name: torch.tensor(0.25) for name in layout.scales if name != "weight_scale"}
        found.append(Quantized(layout, weight, scale, **given))
    return [dataclasses.replace(layer, **{k: v[i] for k, v in changes.items()}) for i, layer in enumerate(found)]


@pytest.mark.parametrize(("algo", "own"), [*((algo, False) for algo in STORAGES), ("FP8", True)])
def test_every_format_can_be_joined(algo: str, own: bool) -> None:
    group = STORAGES[algo].block or (32 if STORAGES[algo].in_groups else 0)
    changes = {"weight_scale": [torch.tensor(scale) for scale in (0.5, 0.75, 0.25)]} if own else {}
    single = layers(algo, group, **changes)
    joined = fused.join(single)
    if not own:
        layer_layout.check("joined", joined)
    expected = torch.cat([layer_layout.dequantize(layer) for layer in single])
    assert torch.equal(layer_layout.dequantize(joined), expected)
    x = torch.randn(3, 64).bfloat16()
    found = choice.build(joined, None, CPU)(x)
    expected = torch.cat([choice.build(layer, None, CPU)(x) for layer in single], dim=-1)
    assert torch.allclose(found.float(), expected.float(), rtol=0.01, atol=0.01 * expected.float().abs().max().item())


@pytest.mark.parametrize(
    ("algo", "change"),
    [
        ("FP8", {"input_scale": [torch.tensor(s) for s in (0.5, 0.25, 0.5)]}),
        ("W8A16", {"pre_quant_scale": [None, torch.ones(64), None]}),
        ("W8A8_SQ_PER_CHANNEL", {"pre_quant_scale": [torch.ones(64), torch.ones(64), 2 * torch.ones(64)]}),
    ],
)
def test_layers_that_would_get_another_ones_scale_stay_apart(algo: str, change: dict[str, Any]) -> None:
    assert fused.join(layers(algo, **change)) is None


def test_only_whole_groups_are_joined() -> None:
    a, b, c = (f"model.layers.{number}.{part}" for number, part in ((0, "self_attn"), (1, "mlp"), (2, "self_attn")))
    names = [f"{a}.q_proj", f"{a}.k_proj", f"{b}.gate_proj", f"{b}.up_proj", f"{a}.o_proj", "lm_head",
             f"{c}.v_proj", f"{c}.k_proj", f"{c}.q_proj"]  # fmt: skip
    expected = [[f"{a}.q_proj"], [f"{a}.k_proj"], [f"{b}.gate_proj", f"{b}.up_proj"], [f"{a}.o_proj"], ["lm_head"]]
    assert list(fused.groups(names, LLAMA)) == [*expected, [f"{c}.q_proj", f"{c}.k_proj", f"{c}.v_proj"]]


def test_a_part_is_computed_anew_for_every_input() -> None:
    model = nn.ModuleDict({name: nn.Linear(8, size) for name, size in (("q_proj", 8), ("k_proj", 4), ("v_proj", 4))})
    whole = nn.Module()
    whole.model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"self_attn": model})])})
    expected = {name: layer.weight.clone() for name, layer in model.items()}
    biases = {name: layer.bias.clone() for name, layer in model.items()}
    assert fused.fuse_linears(whole, LLAMA) == 1
    for order in (["q_proj", "k_proj", "v_proj"], ["v_proj", "q_proj"], ["v_proj", "v_proj", "k_proj", "q_proj"]):
        x = torch.randn(2, 8)
        for name in order:
            right = torch.nn.functional.linear(x, expected[name], biases[name])
            assert torch.allclose(model[name](x), right, atol=1e-6)
