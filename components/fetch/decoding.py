"""What low precision stands for: pure functions of the stored tensors, which return bfloat16.

The numbers are those of transformers 5.14, bit for bit, where it reads the same form: products in float32, rounded
once.
"""

from __future__ import annotations

import torch

#: E2M1 of OCP's Microscaling Formats 1.0, by the four bits; the highest is the sign.
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP4 = torch.cat([_E2M1, -_E2M1]).bfloat16()
_BYTES = torch.arange(256)
#: The two numbers of a byte, the lower half first, in the 32 bits of two bfloat16.
_PAIRS = torch.stack([_FP4[_BYTES & 15], _FP4[_BYTES >> 4]], dim=1).view(torch.int32).flatten()
#: E4M3 without infinities, as torch has it, by the byte.
_E4M3 = _BYTES.to(torch.uint8).view(torch.float8_e4m3fn).float()
#: E8M0 of the same document: 2 ** (byte - 127), and 255 is no number.
_E8M0 = torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [torch.nan], dtype=torch.bfloat16)
#: Numbers that are float32 at a time.
_AT_ONCE = 4 << 20


def fp8(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """Returns weight [outputs, inputs], E4M3, times its scales.

    Args:
        scale: [⌈outputs / block₀⌉, ⌈inputs / block₁⌉], or one number where there is no block.

    The blocks at the end may be smaller. transformers takes blocks of equal size there, and refuses where that leaves a
    rest.
    """
    outputs, inputs = weight.shape
    height, width = block or (1, inputs)
    scale = scale.float() if block else scale.float().reshape(1, 1).expand(outputs, 1)
    blocks = max(1, _AT_ONCE // (height * inputs))
    made = torch.empty(outputs, inputs, dtype=torch.bfloat16)
    for first in range(0, scale.shape[0], blocks):
        rows = slice(first * height, (first + blocks) * height)
        numbers = _by_byte(_E4M3, weight[rows].view(torch.uint8))
        scales = scale[first : first + blocks].repeat_interleave(height, 0)[: len(numbers)]
        made[rows] = numbers.mul_(scales.repeat_interleave(width, 1)[:, :inputs])
    return made


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns blocks [outputs, groups, 16], two E2M1 a byte, times their scales [outputs, groups], E8M0.

    The products are powers of two times three bits, so bfloat16 holds them exactly.
    """
    numbers = _by_byte(_PAIRS, blocks).view(torch.bfloat16)
    return (numbers * _by_byte(_E8M0, scales).unsqueeze(-1)).flatten(1)


def _by_byte(table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """A table of 256 looked up: on a CPU many times as fast as torch converts E4M3, or indexes."""
    return table.index_select(0, numbers.flatten().int()).reshape(numbers.shape)
