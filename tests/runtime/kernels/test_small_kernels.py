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
from trimtab.components.quantization.methods import columns
from trimtab.runtime.checkpoint import few_bits, layer_layout
from trimtab.runtime.checkpoint.layer_layout import Layout, Quantized
from trimtab.runtime.kernels import tile, words
from trimtab.runtime.kernels.tile import Tile
from trimtab.runtime.linear import choice, elementwise, small_batch
from trimtab.runtime.linear.elementwise import Sizes
from trimtab.runtime.rounding import scales
from trimtab.runtime.rounding.scales import Numbers

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
    from trimtab.runtime.kernels import decoding

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "int", Whole, raising=False)
        yield decoding


@pytest.fixture(params=list(SIZES))
def sizes(request: pytest.FixtureRequest) -> Sizes:
    return SIZES[request.param]


@pytest.mark.parametrize("name", ["add_norm", "silu_mul", "rotate_and_store", "to_int8"])
def test_a_kernel_computes_what_it_replaces(
    name: str, sizes: Sizes, triton_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elementwise, "direct", lambda _: (None,))  # FP8 is rounded another way when interpreted
    function = elementwise.adapted(triton_kernels)[name]
    assert elementwise.try_out(name, function, sizes, CPU) == ""


@pytest.mark.parametrize("numbers", [scales.INT4, scales.INT8, scales.FP8, scales.E2M1], ids=lambda each: each.type)
@pytest.mark.parametrize("moves_from", ["itself", "before"])
def test_columns_are_rounded_in_turn(numbers: Numbers, moves_from: str, triton_kernels: ModuleType) -> None:
    """More columns than a power of two has, rows that fill no program, and numbers that are too large."""
    from trimtab.runtime.kernels import columns as kernel

    draw = torch.Generator().manual_seed(0)
    values, before = (2 * torch.randn(40, 37, generator=draw) for _ in range(2))
    scale = (0.5 + torch.rand(40, 37, generator=draw)) / numbers.largest
    passed_on = 0.1 * torch.randn(40, 40, generator=draw)
    start = before if moves_from == "before" else None
    found = kernel.in_turn(values, scale, passed_on, numbers.type, start)
    for one, other in zip(found, columns.one_by_one(values, scale, passed_on, numbers, start), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_rounding_to_e4m3_saturates(triton_kernels: ModuleType) -> None:
    x, factor = torch.linspace(-3, 3, 1500).view(3, -1).bfloat16(), torch.tensor([200.0])
    found, expected = (function(x, factor).float() for function in (triton_kernels.to_e4m3, elementwise.to_e4m3))
    assert found.max() == expected.max() == few_bits.E4M3_MAX
    assert (found - expected).norm() <= INTERPRETED_FP8 * expected.norm()


def test_keys_and_values_in_fp8_are_stored_as_the_cache_stores_them(triton_kernels: ModuleType) -> None:
    sizes = SIZES["grouped"]
    function = elementwise.adapted(triton_kernels)["rotate_and_store"]
    trial = elementwise.TRIALS["rotate_and_store"]
    found, expected = (trial(kernel, sizes, CPU)[3:] for kernel in (function, elementwise.rotate_and_store))
    for a, b in zip(found, expected, strict=True):
        assert (a.float() - b.float()).norm() <= INTERPRETED_FP8 * b.float().norm()


# ------------------------------------------------------------------------------------------------------ one row


FP4 = {
    "nvfp4_wo": lambda rows, columns: (
        "W4A16_NVFP4", 16, torch.rand(rows, columns // 16).add(0.5).to(torch.float8_e4m3fn), torch.tensor(0.01)
    ),
    "mxfp4_wo": lambda rows, columns: (
        "W4A16_MXFP4", 32, torch.randint(118, 124, (rows, columns // 32), dtype=torch.uint8), None
    ),
}  # fmt: skip


def layer(kind: str, rows: int = 18, columns: int = 200) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind.startswith("bf16"):
        made = torch.nn.Linear(columns, rows, bias="bias" in kind).bfloat16()
        return made.requires_grad_(False)
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    if kind == "int8_wo":
        return choice.WeightOnly(Quantized(Layout("W8A16"), weight, torch.rand(rows) * 0.01), None)
    if kind == "int4":
        scale = torch.rand(rows, columns // 32) * 0.01
        return choice.WeightOnly(Quantized(Layout("W4A16_AWQ", 32), layer_layout.pack_int4(weight >> 4), scale), None)
    if kind in FP4:
        packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
        algo, group, scale, second = FP4[kind](rows, columns)
        return choice.WeightOnly(Quantized(Layout(algo, group), packed, scale, weight_scale_2=second), None)
    if kind.startswith("int8_sq"):
        smoothing = torch.rand(columns) + 0.5 if "smoothed" in kind else None
        given = {"input_scale": torch.tensor(0.03), "pre_quant_scale": smoothing}
        stored = Quantized(Layout("W8A8_SQ_PER_CHANNEL"), weight, torch.rand(rows) * 0.01, **given)
        return choice.Int8Static(stored, torch.randn(rows))
    scale = torch.rand(rows) * 0.02 if "by row" in kind else torch.tensor(0.02)
    stored = Quantized(Layout("FP8"), (weight / 32).to(torch.float8_e4m3fn), scale, torch.tensor(0.01))
    return choice.Fp8(stored, None)


@pytest.mark.parametrize("block", [(2, 8, 4), (16, 64, 4)])  # that fit the matrix, and that do not
@pytest.mark.parametrize(
    "kind", ["bf16", "bf16, bias", "int8_sq", "int8_sq, smoothed", "fp8", "fp8, by row"]
)
def test_one_row_is_the_product_of_many(kind: str, block: tuple[int, int, int], triton_kernels: ModuleType) -> None:
    module = layer(kind)
    given = small_batch.operands(module)
    x_1I = torch.randn(1, 200).bfloat16()
    found = triton_kernels.matvec(x_1I, block=block, **given).float()
    if kind.startswith("fp8"):  # no kernel for it on a CPU
        rounded = few_bits.round_to("e4m3", x_1I.float(), 0.01)
        expected = rounded @ module.weight_OI.float().t() * module.weight_scale
    else:
        expected = module(x_1I).float()
    tolerance = INTERPRETED_FP8 if kind.startswith("fp8") else 0.01
    assert (found - expected).norm() <= tolerance * expected.norm()


CUTS = {"whole": Tile(16, 32, 4, 3, 1), "by three parts": Tile(32, 32, 4, 3, 4)}  # of four, one has nothing to do


@pytest.mark.parametrize("rows", [1, 16, 17])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["int4", *FP4, "int8_wo", "int8_sq", "fp8", "fp8, by row"])
def test_few_rows_are_the_product_of_many(kind: str, cut: str, rows: int, triton_kernels: ModuleType) -> None:
    torch.manual_seed(1)
    module = layer(kind, rows=32, columns={"int8_wo": 192, "int4": 384, **dict.fromkeys(FP4, 384)}.get(kind, 96))
    module.bias = None
    given = small_batch.operands(module)
    x_RI = torch.randn(rows, module.in_features).bfloat16()
    multiply = small_batch.product(module, given, CUTS[cut])
    found = multiply(x_RI).float()
    if kind in ("int4", "int8_wo", *FP4):
        expected = module.dense(x_RI).float()
    else:
        expected = rounded(module, x_RI) @ given["weight"].float().t() * given["scale"]
    assert found.shape == (rows, 32)
    assert (found - expected).norm() <= 0.01 * expected.norm()
    assert torch.equal(multiply(x_RI).float(), found)  # what counts the parts is zero again


def rounded(module: torch.nn.Module, x_RI: torch.Tensor) -> torch.Tensor:
    return module.codes(x_RI).float()


@pytest.mark.parametrize("kind", ["int4", "int8_wo"])
def test_words_are_widened_to_the_numbers_of_the_layer(kind: str, triton_kernels: ModuleType) -> None:
    from trimtab.runtime.kernels import matmul

    module = layer(kind, rows=16, columns=128)
    numbers_OI = words.unpack(module.words_OW, module.bits).float()
    if kind == "int4":
        found = matmul.widen(module.words_OW, 4, module.scale, 32).float()
        expected = (numbers_OI.view(16, 4, 32) * module.scale.t()[..., None]).view(16, 128)
        assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()  # interpreted, what is no bfloat16 is cut
    else:
        assert torch.equal(matmul.widen(module.words_OW, 8).float(), numbers_OI)


@pytest.mark.parametrize("kind", FP4)
def test_words_of_fp4_are_widened_to_the_weight_of_the_layer(kind: str, triton_kernels: ModuleType) -> None:
    from trimtab.runtime.kernels import matmul

    torch.manual_seed(0)
    packed, (algo, group, scale, second) = torch.randint(0, 256, (16, 64), dtype=torch.uint8), FP4[kind](16, 128)
    stored = Quantized(Layout(algo, group), packed, scale, weight_scale_2=second)
    assert choice.WeightOnly.runs(stored)
    module = choice.WeightOnly(stored, None)
    found = matmul.widen(module.words_OW, 4, module.scale, group, floats=True).float()
    expected = layer_layout.scaled_weight(stored)
    assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()  # interpreted, what is no bfloat16 is cut


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_the_numbers(bits: int) -> None:
    numbers_OI = torch.arange(-(1 << bits - 1), 1 << bits - 1, dtype=torch.int8).repeat(3, 16 // bits)
    packed = words.pack(numbers_OI, bits)
    assert packed.dtype == torch.int16 and packed.nbytes == numbers_OI.numel() * bits // 8
    assert torch.equal(words.unpack(packed, bits), numbers_OI)


def test_a_tile_that_does_not_divide_a_matrix_is_not_tried(triton_kernels: ModuleType) -> None:
    module = layer("fp8", rows=192, columns=384)
    given = small_batch.operands(module)
    tiles = tuple(cut for cut in tile.BYTES if cut.inputs == 128)
    assert small_batch.cuts(module, given, 16) == tiles
    assert small_batch.cuts(module, given, 1) == small_batch.BLOCKS + tiles
    assert small_batch.cuts(layer("bf16"), small_batch.operands(layer("bf16")), 16) == ()
    narrow = layer("fp8", rows=96, columns=320)
    assert small_batch.cuts(narrow, small_batch.operands(narrow), 16) == (tile.SMALL_BYTES[2],)
    small = layer("int4", rows=64, columns=512)  # groups of 32, and no tile has so few words
    assert small_batch.cuts(small, small_batch.operands(small), 1) == ()
    with pytest.raises(ValueError, match="a tile of 64 x 64 does not divide 64 x 128 in groups of 32"):
        small.by(tile.WORDS[0])


@pytest.mark.parametrize(
    ("sizes", "few", "many"),
    [
        ((4096, 1024, 128), Tile(64, 64, 2, 3, 4), Tile(128, 64, 8, 3, 4)),
        ((28672, 1024, 64), Tile(64, 64, 2, 3, 1), Tile(128, 64, 8, 3, 1)),
        ((4096, 3584, 64), Tile(64, 64, 2, 3, 8), Tile(128, 64, 8, 3, 4)),
        ((576, 144, 64), Tile(64, 16, 2, 3, 2), Tile(64, 16, 4, 3, 2)),
        ((48, 32, 0), Tile(16, 32, 1, 3, 1), Tile(16, 32, 1, 3, 1)),
    ],
)
def test_the_usual_tile_divides_and_keeps_a_gpu_busy(sizes: tuple[int, int, int], few: Tile, many: Tile) -> None:
    assert (tile.usual(*sizes, few=True), tile.usual(*sizes, few=False)) == (few, many)
    assert few.divides(*sizes) and many.divides(*sizes)


def test_layers_of_one_kind_and_shape_are_measured_together() -> None:
    kinds = ("fp8", "bf16", "fp8, by row", "fp8", "bf16, bias", "bf16")
    layers = [layer(kind) for kind in kinds]
    hooked = layer("bf16")
    hooked.register_forward_hook(lambda *_: None)  # as where ranks add up
    found = small_batch.by_shape([*layers, layers[0], hooked, layer("bf16", rows=20)])
    assert [[layers.index(x) for x, _ in members] for members in found[:-1]] == [[0, 3], [1, 5], [2], [4]]
    assert [x.out_features for x, _ in found[-1]] == [20]


def test_what_has_no_product_of_few_rows_keeps_its_own() -> None:
    smoothed = Quantized(Layout("W8A16"), torch.ones(16, 32, dtype=torch.int8), torch.ones(16))
    plain = layer("int8_sq")
    assert small_batch.operands(plain) is not None
    plain.pre_quant_scale = torch.ones(200)
    assert small_batch.operands(choice.Int8WeightOnly(smoothed, None)) is None
    assert small_batch.operands(plain) is None
    assert small_batch.operands(choice.Emulated(smoothed, None)) is None


# ----------------------------------------------------------------------------------------------------- trying out


def test_a_kernel_that_fails_or_computes_something_else_is_not_used() -> None:
    sizes = SIZES["grouped"]

    def broken(*_: Any) -> None:
        raise RuntimeError("no such instruction\nmore")

    def wrong(x: torch.Tensor, *rest: Any) -> Any:
        return tuple(1.1 * part for part in elementwise.add_norm(x, *rest))

    assert elementwise.try_out("add_norm", elementwise.add_norm, sizes, CPU) == ""
    assert elementwise.try_out("add_norm", broken, sizes, CPU) == "RuntimeError: no such instruction"
    assert "other numbers" in elementwise.try_out("add_norm", wrong, sizes, CPU)


def test_what_is_left_as_it_was_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trimtab.runtime.kernels.decoding", None)
    monkeypatch.delattr(runtime, "triton_kernels", raising=False)
    assert elementwise.choose(SIZES["grouped"], torch.device("cuda")) == elementwise.Kernels()
    assert capsys.readouterr().err.count("runs without a kernel of its own: ") == 3


def test_a_cpu_has_no_kernels_of_its_own() -> None:
    found = elementwise.choose(SIZES["grouped"], CPU)
    assert found == elementwise.Kernels()
    for name in ("to_e4m3", "to_int8"):
        assert elementwise.rounding(name, CPU) is getattr(elementwise, name)
