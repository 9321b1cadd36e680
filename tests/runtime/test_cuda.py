"""The packed linears' CUDA kernels against a dense product with the dequantised weights; needs a CUDA GPU."""

from __future__ import annotations

import pytest
import torch

from trimtab.runtime import formats, linear
from trimtab.runtime.formats import Layout, Quantized

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

OUT, IN = 192, 128


def int8(algo: str, input_scale: float | None) -> Quantized:
    weight = torch.randint(-127, 128, (OUT, IN), dtype=torch.int8)
    return Quantized(Layout(algo), weight, torch.rand(OUT) * 0.01 + 0.001, _scalar(input_scale))


def fp8() -> Quantized:
    weight = torch.randn(OUT, IN).to(torch.float8_e4m3fn)
    return Quantized(Layout("FP8"), weight, torch.tensor(0.02), torch.tensor(0.01))


def int4() -> Quantized:
    packed = torch.randint(0, 256, (OUT // 2, IN), dtype=torch.uint8)
    return Quantized(Layout("W4A16_AWQ", 64), packed, (torch.rand(OUT, IN // 64) * 0.01 + 0.001).bfloat16())


def _scalar(value: float | None) -> torch.Tensor | None:
    return None if value is None else torch.tensor(value)


CASES = {
    "int8_wo": (lambda: int8("W8A16", None), "emulated"),
    "int8_sq": (lambda: int8("W8A8_SQ_PER_CHANNEL", 0.03), "_int_mm"),
    "fp8": (fp8, "_scaled_mm"),
    "int4": (int4, "emulated"),
}


@pytest.mark.parametrize("rows", [1, 5, 17, 64])
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_computes_the_dense_product(name: str, rows: int) -> None:
    torch.manual_seed(rows)
    make, kernel = CASES[name]
    layer = make()
    module = linear.build(layer, None, torch.device("cuda"))
    assert module.emulated == (kernel == "emulated") and (module.emulated or module.kernel == kernel)
    x_RI = torch.randn(rows, IN, device="cuda", dtype=torch.bfloat16)
    rounded = _rounded(x_RI.float(), layer)
    expected = rounded @ formats.dequantize(layer).cuda().t()
    found = module(x_RI).float()
    assert (found - expected).norm() / expected.norm() < 0.01  # bfloat16 keeps eight bits


def _rounded(x: torch.Tensor, layer: Quantized) -> torch.Tensor:
    if layer.input_scale is None:
        return x
    scale = layer.input_scale.cuda()
    if layer.layout.algo == "FP8":
        limit = formats.E4M3_MAX
        return (x / scale).clamp(-limit, limit).to(torch.float8_e4m3fn).float() * scale
    return (x / scale).round().clamp(-128, 127) * scale
