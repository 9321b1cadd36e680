"""Triton's kernels against what they replace, interpreted on the CPU; on a GPU, test_cuda.py runs them compiled."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from trimtab import runtime
from trimtab.runtime import few_rows, formats, linear, small_kernels
from trimtab.runtime.formats import Layout, Quantized
from trimtab.runtime.paged import PagedKVCache
from trimtab.runtime.small_kernels import Sizes

CPU = torch.device("cpu")
#: Triton's interpreter cuts what e4m3 has no bits for, where a GPU rounds.
INTERPRETED_FP8 = 0.08
SIZES = {
    "grouped": Sizes(6, 2, 32, 96, 200),
    "one head of keys": Sizes(4, 1, 16, 64, 1200),
    "no groups": Sizes(2, 2, 64, 80, 16),
}


class _AlsoInt(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, int)


class Whole(metaclass=_AlsoInt):
    """`int` as it was before NumPy 2.4, which makes no number of an array of one; Triton 3.6 does, for loops."""

    def __new__(cls, value: Any) -> int:
        return int(value.item() if hasattr(value, "item") else value)


@pytest.fixture(scope="module")
def triton_kernels() -> Iterator[ModuleType]:
    """The kernels as they run without a GPU, which conftest.py makes Triton do."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles here")
    from trimtab.runtime import triton_kernels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "int", Whole, raising=False)
        yield triton_kernels


@pytest.fixture(params=list(SIZES))
def sizes(request: pytest.FixtureRequest) -> Sizes:
    return SIZES[request.param]


@pytest.mark.parametrize("name", ["add_norm", "silu_mul", "rotate_and_store"])
def test_a_kernel_computes_what_it_replaces(
    name: str, sizes: Sizes, triton_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_kernels, "direct", lambda _: (None,))  # FP8 is rounded another way when interpreted
    function = small_kernels.adapted(triton_kernels)[name]
    assert small_kernels.try_out(name, function, sizes, CPU) == ""


@pytest.mark.parametrize(("lengths", "programs"), [([6, 1, 34], 264), ([300], 264), ([64, 65, 128, 200], 1)])
def test_attention_reads_every_token_of_a_sequence_once(
    lengths: list[int], programs: int, sizes: Sizes, triton_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(triton_kernels, "PROGRAMS", programs)  # with one, sequences are not cut into parts
    cache = PagedKVCache({0: (sizes.kv_heads, sizes.head_dim)}, 20, 16, CPU)
    where, _ = small_kernels.one_token_each(cache, CPU, [length - 1 for length in lengths])
    pair = [torch.randn(21, 16, sizes.kv_heads, sizes.head_dim) for _ in range(2)]
    query = torch.randn(len(lengths), sizes.heads, sizes.head_dim)
    # In float32, for interpreted products of bfloat16 are products of its bits.
    found = triton_kernels.attend(query, *pair, where.tables_SW, where.lengths_S, 0.3)
    for number, length in enumerate(lengths):
        group = sizes.heads // sizes.kv_heads
        keys, values = (x[where.tables_SW[number]].flatten(0, 1)[:length] for x in pair)
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        shares = (torch.einsum("hd,lhd->hl", query[number], keys) * 0.3).softmax(-1)
        assert torch.allclose(found[number], torch.einsum("hl,lhd->hd", shares, values), atol=1e-4)


def test_rounding_to_e4m3_saturates(triton_kernels: ModuleType) -> None:
    x, factor = torch.linspace(-3, 3, 1500).view(3, -1).bfloat16(), torch.tensor([200.0])
    found, expected = (function(x, factor).float() for function in (triton_kernels.to_e4m3, small_kernels.to_e4m3))
    assert found.max() == expected.max() == formats.E4M3_MAX
    assert (found - expected).norm() <= INTERPRETED_FP8 * expected.norm()


def test_few_sequences_are_cut_into_more_parts_than_many(triton_kernels: ModuleType) -> None:
    parts = [triton_kernels.splits(batch, 8, 384) for batch in (1, 8, 64)]
    assert parts == [8, 8, 1]
    assert triton_kernels.splits(1, 8, 16) == 1


def test_keys_and_values_in_fp8_are_stored_as_the_cache_stores_them(triton_kernels: ModuleType) -> None:
    sizes = SIZES["grouped"]
    function = small_kernels.adapted(triton_kernels)["rotate_and_store"]
    trial = small_kernels.TRIALS["rotate_and_store"]
    found, expected = (trial(kernel, sizes, CPU)[3:] for kernel in (function, small_kernels.rotate_and_store))
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b.float()).norm() <= INTERPRETED_FP8 * b.float().norm()


# ------------------------------------------------------------------------------------------------------ one row


def layer(kind: str, rows: int = 18, columns: int = 200) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind.startswith("bf16"):
        made = torch.nn.Linear(columns, rows, bias="bias" in kind).bfloat16()
        return made.requires_grad_(False)
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    if kind == "int8_wo":
        return linear.Int8WeightOnlyCuda(Quantized(Layout("W8A16"), weight, torch.rand(rows) * 0.01), None)
    if kind.startswith("int8_sq"):
        smoothing = torch.rand(columns) + 0.5 if "smoothed" in kind else None
        given = {"input_scale": torch.tensor(0.03), "pre_quant_scale": smoothing}
        stored = Quantized(Layout("W8A8_SQ_PER_CHANNEL"), weight, torch.rand(rows) * 0.01, **given)
        return linear.Int8Static(stored, torch.randn(rows))
    scale = torch.rand(rows) * 0.02 if "by row" in kind else torch.tensor(0.02)
    stored = Quantized(Layout("FP8"), (weight / 32).to(torch.float8_e4m3fn), scale, torch.tensor(0.01))
    return linear.Fp8(stored, None)


@pytest.mark.parametrize("block", [(2, 8, 4), (16, 64, 4)])  # that fit the matrix, and that do not
@pytest.mark.parametrize(
    "kind", ["bf16", "bf16, bias", "int8_wo", "int8_sq", "int8_sq, smoothed", "fp8", "fp8, by row"]
)
def test_one_row_is_the_product_of_many(kind: str, block: tuple[int, int, int], triton_kernels: ModuleType) -> None:
    module = layer(kind)
    given = few_rows.operands(module)
    x_1I = torch.randn(1, 200).bfloat16()
    found = triton_kernels.matvec(x_1I, block=block, **given).float()
    if kind.startswith("fp8"):  # no kernel for it on a CPU
        rounded = formats.round_fp8(x_1I.float(), 0.01)
        expected = rounded @ module.weight_OI.float().t() * module.weight_scale
    else:
        expected = module(x_1I).float()
    tolerance = INTERPRETED_FP8 if kind.startswith("fp8") else 0.01
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("rows", [2, 16, 17])
@pytest.mark.parametrize("kind", ["int8_wo", "fp8", "fp8, by row"])
def test_few_rows_are_the_product_of_many(kind: str, rows: int, triton_kernels: ModuleType) -> None:
    module = layer(kind, rows=32, columns=128)
    block, given = (16, 64, 4, 3), few_rows.operands(module)
    x_RI = torch.randn(rows, 128).bfloat16()
    if kind == "int8_wo":  # in float32, for interpreted products of bfloat16 are products of its bits
        expected = module(x_RI).float()
        found = few_rows.product(module, given, block)(x_RI.float()).float()
    else:
        found = few_rows.product(module, given, block)(x_RI).float()
        rounded = formats.round_fp8(x_RI.float(), 0.01)
        expected = rounded @ module.weight_OI.float().t() * module.weight_scale
    assert found.shape == (rows, 32)
    assert (found - expected).norm() <= 0.01 * expected.norm()


def test_a_block_that_does_not_divide_a_matrix_is_not_tried(triton_kernels: ModuleType) -> None:
    module = layer("fp8", rows=96, columns=256)
    given = few_rows.operands(module)
    tiles = few_rows.blocks(module, given, 16)
    assert tiles == ((16, 256, 4, 4), (32, 128, 4, 5), (32, 256, 4, 4))
    assert few_rows.blocks(module, given, 1) == few_rows.BLOCKS
    assert few_rows.blocks(layer("bf16"), few_rows.operands(layer("bf16")), 16) == ()
    with pytest.raises(ValueError, match="a block of 64 x 128 does not divide 96 x 256"):
        few_rows.product(module, given, (64, 128, 4, 5))(torch.ones(2, 256).bfloat16())


def test_layers_of_one_kind_and_shape_are_measured_together() -> None:
    kinds = ("fp8", "bf16", "fp8, by row", "fp8", "bf16, bias", "bf16")
    layers = [layer(kind) for kind in kinds]
    hooked = layer("bf16")
    hooked.register_forward_hook(lambda *_: None)  # as where ranks add up
    found = few_rows.by_shape([*layers, layers[0], hooked, layer("bf16", rows=20)])
    assert [[layers.index(x) for x, _ in members] for members in found[:-1]] == [[0, 3], [1, 5], [2], [4]]
    assert [x.out_features for x, _ in found[-1]] == [20]


def test_what_has_no_product_of_few_rows_keeps_its_own() -> None:
    smoothed = Quantized(Layout("W8A16"), torch.ones(16, 32, dtype=torch.int8), torch.ones(16))
    plain = linear.Int8WeightOnly(smoothed, None)
    assert few_rows.operands(plain) is not None
    plain.pre_quant_scale = torch.ones(32)
    assert few_rows.operands(plain) is None
    assert few_rows.operands(linear.Emulated(smoothed, None)) is None


# ----------------------------------------------------------------------------------------------------- trying out


def test_a_kernel_that_fails_or_computes_something_else_is_not_used() -> None:
    sizes = SIZES["grouped"]

    def broken(*_: Any) -> None:
        raise RuntimeError("no such instruction\nmore")

    def wrong(x: torch.Tensor, *rest: Any) -> Any:
        return tuple(1.1 * part for part in small_kernels.add_norm(x, *rest))

    assert small_kernels.try_out("add_norm", small_kernels.add_norm, sizes, CPU) == ""
    assert small_kernels.try_out("add_norm", broken, sizes, CPU) == "RuntimeError: no such instruction"
    assert "other numbers" in small_kernels.try_out("add_norm", wrong, sizes, CPU)


def test_what_is_left_as_it_was_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trimtab.runtime.triton_kernels", None)
    monkeypatch.delattr(runtime, "triton_kernels", raising=False)
    assert small_kernels.choose(SIZES["grouped"], torch.device("cuda")) == small_kernels.Kernels()
    assert capsys.readouterr().err.count("runs without a kernel of its own: ") == 4


def test_a_cpu_has_no_kernels_of_its_own() -> None:
    found = small_kernels.choose(SIZES["grouped"], CPU)
    assert found == small_kernels.Kernels()
    assert small_kernels.rounding(CPU) is small_kernels.to_e4m3
