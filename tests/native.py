"""Tiny checkpoints as publishers store them: FP8 with block scales, MXFP4, experts in one tensor, old prefixes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
#: The largest number of E4M3 and of E2M1.
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
WEIGHTS = "model.safetensors"


def rewrite(
    folder: Path,
    change: Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]],
    **config: Any,
) -> Path:
    """Replaces each tensor of a model by what `change` makes of it, and fields of its config."""
    tensors = load_file(folder / WEIGHTS)
    made = {new: value.contiguous() for name, tensor in tensors.items() for new, value in change(name, tensor).items()}
    save_file(made, folder / WEIGHTS, {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def to_fp8(folder: Path, block: tuple[int, int] | None = (32, 32)) -> Path:
    """Stores the layers of a model as DeepSeek does, or with one scale a tensor."""

    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if tensor.dim() != 2 or "proj" not in name:
            return {name: tensor}
        weight, scale = fp8(tensor, block)
        return {name: weight, f"{name}_scale_inv": scale}

    settings = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": block and [*block],
    }
    return rewrite(folder, change, quantization_config=settings)


def fp8(tensor: torch.Tensor, block: tuple[int, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns E4M3 and the float32 scales by which it is multiplied; blocks at the end may be smaller."""
    rows, columns = tensor.shape
    height, width = block or (rows, columns)
    weight = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // height), -(-columns // width))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scale[i, j] = tensor[place].float().abs().max() / _E4M3_MAX
            weight[place] = (tensor[place].float() / scale[i, j]).to(torch.float8_e4m3fn)
    return weight, scale if block else scale.reshape(())


def mxfp4(experts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns blocks [E, outputs, groups, 16] and scales [E, outputs, groups] of experts [E, inputs, outputs]."""
    groups = experts.float().transpose(1, 2).unflatten(2, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(3).clamp(min=1e-30) / _E2M1_MAX)) + 1
    scaled = groups / torch.exp2(exponent).unsqueeze(-1)
    code = (scaled.abs().unsqueeze(-1) - _E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    return (code[..., 0::2] + 16 * code[..., 1::2]).to(torch.uint8), (exponent + 127).to(torch.uint8)


def to_mxfp4(folder: Path) -> Path:
    """Stores the experts of a gpt-oss model in 16 bits as OpenAI publishes them."""

    def change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if tensor.dim() != 3:
            return {name: tensor}
        blocks, scales = mxfp4(tensor)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    return rewrite(folder, change, quantization_config={"quant_method": "mxfp4"})


def stack(folder: Path, count: int) -> Path:
    """Stores experts that have a matrix each in one tensor for all, as Qwen3.5 publishes them."""
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if ".experts.0.gate_proj." in name]:
        experts = name.partition(".0.gate_proj.")[0]
        parts = [
            [tensors.pop(f"{experts}.{n}.{part}_proj.weight") for n in range(count)] for part in ("gate", "up", "down")
        ]
        gate, up, down = (torch.stack(part) for part in parts)
        tensors |= {f"{experts}.gate_up_proj": torch.cat([gate, up], 1), f"{experts}.down_proj": down}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder
