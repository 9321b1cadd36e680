"""CUDA kernels against a dense product with the dequantised weights, and replayed decoding; needs a CUDA GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trimtab.components.quantization.methods import columns
from trimtab.recipe import Engine
from trimtab.runtime.checkpoint import few_bits, layer_layout
from trimtab.runtime.checkpoint.layer_layout import Layout, Quantized
from trimtab.runtime.decoder import decode
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.linear import choice, elementwise, small_batch
from trimtab.runtime.linear.elementwise import Sizes
from trimtab.runtime.rounding import scales
from trimtab.runtime.rounding.scales import Numbers
from trimtab.runtime.service.forward import Attention
from trimtab.runtime.service.paged_engine import PagedEngine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CUDA = torch.device("cuda")
OUT = 192


def int8(algo: str, input_scale: float | None = None, columns: int = 128) -> Quantized:
    weight = torch.randint(-127, 128, (OUT, columns), dtype=torch.int8)
    given = None if input_scale is None else torch.tensor(input_scale)
    return Quantized(Layout(algo), weight, torch.rand(OUT) * 0.01 + 0.001, given)


def fp8(columns: int = 128, by_row: bool = False) -> Quantized:
    weight = torch.randn(OUT, columns).to(torch.float8_e4m3fn)
    scale = torch.rand(OUT) * 0.02 + 0.01 if by_row else torch.tensor(0.02)
    return Quantized(Layout("FP8"), weight, scale, torch.tensor(0.01))


def triton_kernels() -> ModuleType:
    from trimtab.runtime.kernels import decoding

    return decoding


def fp8_per_token() -> Quantized:
    weight = torch.randn(OUT, 128).to(torch.float8_e4m3fn)
    return Quantized(Layout("FP8_PER_CHANNEL_PER_TOKEN"), weight, torch.rand(OUT) * 0.01 + 0.001)


def int4(group: int, columns: int = 256, algo: str = "W4A16_AWQ") -> Quantized:
    packed = torch.randint(0, 256, (OUT // 2, columns), dtype=torch.uint8)
    return Quantized(Layout(algo, group), packed, (torch.rand(OUT, columns // group) * 0.01 + 0.001).bfloat16())


def nvfp4() -> Quantized:
    packed = torch.randint(0, 256, (OUT, 64), dtype=torch.uint8)
    scale = (torch.rand(OUT, 8) + 0.5).to(torch.float8_e4m3fn)
    return Quantized(Layout("NVFP4", 16), packed, scale, torch.tensor(0.002), weight_scale_2=torch.tensor(0.01))


def fp4_weights(algo: str, group: int) -> Quantized:
    packed = torch.randint(0, 256, (OUT, 128), dtype=torch.uint8)
    if algo == "W4A16_MXFP4":
        return Quantized(Layout(algo, group), packed, torch.randint(118, 124, (OUT, 256 // group), dtype=torch.uint8))
    scale = (torch.rand(OUT, 256 // group) + 0.5).to(torch.float8_e4m3fn)
    return Quantized(Layout(algo, group), packed, scale, weight_scale_2=torch.tensor(0.01))


needs_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="FP8 needs 8.9"
)
CASES = {
    "int8_wo": (lambda: int8("W8A16"), "int8 in words, Triton"),
    "int8_wo, odd columns": (lambda: int8("W8A16", columns=100), "dequantize + mm"),
    "int8_sq": (lambda: int8("W8A8_SQ_PER_CHANNEL", 0.03), "_int_mm"),
    "int8_sq, odd columns": (lambda: int8("W8A8_SQ_PER_CHANNEL", 0.03, 100), "dequantize + mm"),
    "int4, 32": (lambda: int4(32), "int4 in words, Triton"),
    "int4, 64": (lambda: int4(64), "int4 in words, Triton"),
    "int4, 64, nine groups": (lambda: int4(64, 576), "int4 in words, Triton"),
    "int4, 128": (lambda: int4(128), "int4 in words, Triton"),
    "int4, 256": (lambda: int4(256), "int4 in words, Triton"),
    "int4, 16": (lambda: int4(16), "int4 in words, Triton"),
    "int4, odd columns": (lambda: int4(48, 144), "dequantize + mm"),
    "nvfp4": (nvfp4, "dequantize + mm"),
    "nvfp4_wo": (lambda: fp4_weights("W4A16_NVFP4", 16), "e2m1 in words, Triton"),
    "mxfp4_wo": (lambda: fp4_weights("W4A16_MXFP4", 32), "e2m1 in words, Triton"),
    "fp8": (fp8, "_scaled_mm"),
    "fp8, a scale a row": (lambda: fp8(by_row=True), "_scaled_mm"),
    "fp8_per_channel": (fp8_per_token, "_scaled_mm, row-wise"),
}


@pytest.mark.parametrize("rows", [1, 5, 17, 64, 300])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_fp8) if name.startswith("fp8") else name for name in CASES]
)
def test_a_kernel_computes_the_dense_product(name: str, rows: int) -> None:
    torch.manual_seed(rows)
    make, kernel = CASES[name]
    layer = make()
    bias = torch.randn(OUT).bfloat16()
    module = choice.build(layer, bias, CUDA)
    assert (module.kernel, module.emulated) == (kernel, kernel.endswith("+ mm"))
    x_RI = torch.randn(rows, layer.shape[1], device=CUDA, dtype=torch.bfloat16)
    expected = _rounded(x_RI.float(), layer) @ layer_layout.dequantize(layer).cuda().t() + bias.cuda()
    found = module(x_RI).float()
    assert (found - expected).norm() / expected.norm() < 0.01  # bfloat16 keeps eight bits


@pytest.mark.parametrize("name", [name for name, (_, kernel) in CASES.items() if "words" in kernel])
def test_packed_and_dense_paths_agree(name: str) -> None:
    module = choice.build(CASES[name][0](), None, CUDA)
    x = torch.randn(33, module.in_features, device=CUDA, dtype=torch.bfloat16)
    packed, dense = module.packed(x).float(), module.dense(x).float()
    assert (packed - dense).norm() / dense.norm() < 0.01


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.runtime.kernels import matmul

    right = matmul.Matmul.__call__
    monkeypatch.setattr(matmul.Matmul, "__call__", lambda *args: right(*args) * 1.5)
    assert choice.build(int4(64), None, CUDA).emulated


def _rounded(x: torch.Tensor, layer: Quantized) -> torch.Tensor:
    inputs = layer.layout.storage.inputs
    scale = None if layer.input_scale is None else layer.input_scale.cuda()
    if inputs is None:
        return x
    if inputs.scale == "token":
        return few_bits.round_to("e4m3", x, x.abs().amax(-1, keepdim=True) / few_bits.E4M3_MAX)
    return few_bits.round_to(inputs.numbers, x, scale)


@pytest.fixture
def engine(plain_folder: Path) -> TorchEngine:
    return TorchEngine(plain_folder, Engine(max_seq_len=128), "cuda")


@torch.inference_mode()
def test_a_replayed_step_gives_the_tokens_of_the_model(engine: TorchEngine, windows: torch.Tensor) -> None:
    prompt = windows[:, :8].cuda()
    replay = decode.Static(engine.model, *prompt.shape, 40)
    replay.capture()
    eager = decode.Static(engine.model, *prompt.shape, 40)
    growing = decode.Growing(engine.model)
    found, expected, plain = (_tokens(decoder, prompt) for decoder in (replay, eager, growing))
    assert torch.equal(found, expected)
    assert torch.equal(_tokens(replay, prompt), expected)  # a second run begins anew
    assert (found == plain).float().mean() > 0.8  # other attention kernels, so a tie may fall otherwise


def test_decoding_is_replayed(engine: TorchEngine) -> None:
    assert len(engine.decode_speed(2, 8, 8, 2)) == 2
    assert engine.decode_path == "CUDA graph, step of its own"


@pytest.mark.parametrize("make", [nvfp4, lambda: int4(64, 128, "W4A16_AWQ"), fp8_per_token, fp8])
def test_a_layer_can_be_captured(make: Callable[[], Quantized]) -> None:
    module = choice.build(make(), None, CUDA)
    x = torch.randn(3, 128, device=CUDA, dtype=torch.bfloat16)
    expected = module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = module(x)
    graph.replay()
    assert torch.equal(found, expected)


def _tokens(decoder: decode.Recorded | decode.Growing, prompt: torch.Tensor) -> torch.Tensor:
    decoder.prefill(prompt)
    return decoder.steps(24)


@pytest.mark.parametrize("name", list(elementwise.TRIALS))
@pytest.mark.parametrize(
    "sizes", [Sizes(32, 8, 128, 4096, 14336), Sizes(9, 3, 64, 576, 1536), Sizes(4, 2, 16, 64, 128)]
)
def test_a_small_kernel_computes_what_it_replaces(name: str, sizes: Sizes) -> None:
    function = elementwise.adapted(triton_kernels())[name]
    assert elementwise.try_out(name, function, sizes, CUDA) == ""


@needs_fp8
def test_rounding_to_e4m3_is_pytorchs() -> None:
    x = torch.cat([torch.linspace(-600, 600, 100_001), torch.linspace(-0.1, 0.1, 10_001)]).bfloat16().cuda()
    factor = torch.ones(1, device=CUDA)
    found, expected = (f(x, factor).view(torch.uint8) for f in (triton_kernels().to_e4m3, elementwise.to_e4m3))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("rows", [1, 3, 16, 33, 64])
@pytest.mark.parametrize("columns", [256, 576])
@pytest.mark.parametrize(
    "make",
    [
        lambda columns: torch.nn.Linear(columns, OUT, device=CUDA, dtype=torch.bfloat16),
        lambda columns: choice.build(int4(64, 4 * columns), None, CUDA),
        lambda columns: choice.build(int8("W8A16", columns=2 * columns), None, CUDA),
        lambda columns: choice.build(int8("W8A8_SQ_PER_CHANNEL", 0.03, columns), torch.randn(OUT), CUDA),
        pytest.param(lambda columns: choice.build(fp8(columns), None, CUDA), marks=needs_fp8),
        pytest.param(lambda columns: choice.build(fp8(columns, by_row=True), None, CUDA), marks=needs_fp8),
    ],
    ids=["bf16", "int4", "int8_wo", "int8_sq", "fp8", "fp8, by row"],
)
@torch.inference_mode()
def test_every_block_computes_the_product_of_few_rows(
    make: Callable[[int], torch.nn.Module], columns: int, rows: int
) -> None:
    torch.manual_seed(0)
    (members,) = small_batch.by_shape([make(columns) for _ in range(3)])
    found = small_batch.measure(members, rows)
    assert set(found) == {None, *small_batch.cuts(*members[0], rows)}
    assert all(0 < seconds < 1 for seconds in found.values())


@torch.inference_mode()
def test_a_step_of_the_engines_own_gives_the_tokens_of_the_model(engine: TorchEngine, windows: torch.Tensor) -> None:
    prompt = windows[:, :8].cuda()
    assert engine._step
    assert engine._step.by_spans
    stepping = decode.Stepping(engine._step, engine.model, *prompt.shape, 40)
    launched = _tokens(stepping, prompt)
    stepping.capture()
    assert torch.equal(_tokens(stepping, prompt), launched)
    assert torch.equal(_tokens(stepping, prompt), launched)  # a second run begins anew
    plain = _tokens(decode.Growing(engine.model), prompt)
    assert (launched == plain).float().mean() > 0.8  # a tie may fall otherwise


@pytest.mark.parametrize("attention", ["kernel", "gathered"])
@pytest.mark.parametrize("block_size", [16, 128])
def test_replayed_paged_steps_give_the_tokens_of_launched_ones(
    plain_folder: Path, windows: torch.Tensor, block_size: int, attention: Attention
) -> None:
    settings = Engine(max_seq_len=128, max_batch_size=4, max_num_tokens=32, enable_chunked_prefill=True)
    prompts = [window[: 3 + 4 * n].tolist() for n, window in enumerate(windows)]
    served = PagedEngine(plain_folder, settings, "cuda", block_size=block_size, attention=attention)
    found = served.generate(prompts, 40)
    assert (served.decode_path, served.attention_path.split()[0]) == ("CUDA graph", attention)
    assert served.generate(prompts, 40) == found and served.pool.used == 0
    served.lay_out(settings, block_size, recorded=False)
    expected = served.generate(prompts, 40)
    assert served.decode_path == "loop"
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 4  # padded, a tie may fall otherwise


def test_products_of_bfloat16_are_summed_in_float32() -> None:
    """Beside float64; a sum in bfloat16 would err by some 2^-9."""
    from trimtab.runtime.measure.observe import add_product

    x, y = (torch.randn(5000, 96, device=CUDA).bfloat16() for _ in range(2))
    found = torch.ones(96, 96, device=CUDA)
    add_product(found, x, y)
    expected = 1 + x.double().t() @ y.double()
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_hidden_states_stay_on_the_device_while_they_take_little_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is laid down in host memory comes back as it was."""
    from trimtab.runtime.measure import activations

    shapes = [torch.Size((2, 8, 4)), torch.Size((1, 8, 4))]
    for share, place in ((1 / 8, "device"), (0.0, "host")):
        monkeypatch.setattr(activations, "DEVICE_SHARE", share)
        held = activations.Activations(shapes, torch.bfloat16, CUDA)
        assert held.place == place
        given = [torch.randn(shape, device=CUDA).bfloat16() for shape in shapes]
        for number, hidden in enumerate(given):
            held[number] = hidden
        assert all(torch.equal(held[number], hidden) for number, hidden in enumerate(given))


@pytest.mark.parametrize("numbers", [scales.INT4, scales.INT8, scales.FP8, scales.E2M1], ids=lambda each: each.type)
def test_columns_are_rounded_in_turn_by_one_kernel(numbers: Numbers) -> None:
    pytest.importorskip("triton")
    kernel = columns._kernel()
    assert kernel is not None
    values, before = torch.randn(64, 1000, device=CUDA), torch.randn(64, 1000, device=CUDA)
    scale, told = torch.full_like(values, 2 / numbers.largest), 0.1 * torch.randn(64, 64, device=CUDA)
    given = values, scale, told, numbers, before
    found, _ = columns.in_turn(*given)
    expected, _ = columns.one_by_one(*given)
    assert ((found - expected).abs() > 1e-4).float().mean() < 0.001
