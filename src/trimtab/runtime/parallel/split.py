"""Tensor parallelism on tensors: which part of a matrix, or of its scales, a rank holds.

A column-parallel layer is split along its output features, a row-parallel one along its input features, as in
Shoeybi et al. 2019, Megatron-LM (arXiv 1909.08053). Of what a layer stores:

| | weight | a scale a row | a scale a group | pre_quant_scale | bias |
|---|---|---|---|---|---|
| column | rows | rows | rows | whole | rows |
| row | columns | whole | columns | part | whole |

Scalars are every rank's. TensorRT-LLM and ModelOpt (modelopt/torch/export/postprocess.py) split so too.
"""

from __future__ import annotations

import torch


def rows(tensor: torch.Tensor, units: int, rank: int, ranks: int) -> torch.Tensor:
    """Returns the part of a rank along the first axis, which has `units` inseparable runs of rows, such as heads.

    More ranks than units share them: neighbours get the same one, as attention does with KV heads.

    Raises:
        ValueError: it does not come out even.
    """
    if tensor.shape[0] % units or (units % ranks and ranks % units):
        raise ValueError(f"{tensor.shape[0]} rows in {units} runs cannot be shared out among {ranks} ranks")
    size, first, count = tensor.shape[0] // units, rank * units // ranks, max(1, units // ranks)
    return tensor[first * size : (first + count) * size]


def columns(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """Returns the part of a rank along the last axis.

    Raises:
        ValueError: it does not come out even.
    """
    if tensor.shape[-1] % ranks:
        raise ValueError(f"{tensor.shape[-1]} columns cannot be shared out among {ranks} ranks")
    size = tensor.shape[-1] // ranks
    return tensor[..., rank * size : (rank + 1) * size]


def padded_rows(tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """Returns the part of a rank along the first axis, with zeros where the last ranks have no rows: embeddings."""
    size = -(-tensor.shape[0] // ranks)
    part = tensor[rank * size : (rank + 1) * size]
    return torch.cat([part, part.new_zeros(size - part.shape[0], *part.shape[1:])])


def column_parallel(part: str, tensor: torch.Tensor, units: int, rank: int, ranks: int) -> torch.Tensor:
    """Returns a rank's part of what a column-parallel layer stores as `part`: weight, bias or one of the scales."""
    return tensor if tensor.numel() == 1 or part == "pre_quant_scale" else rows(tensor, units, rank, ranks)


def row_parallel(part: str, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """Returns a rank's part of what a row-parallel layer stores as `part`: weight, bias or one of the scales."""
    whole = tensor.numel() == 1 or (tensor.dim() == 1 and part != "pre_quant_scale")
    return tensor if whole else columns(tensor, rank, ranks)
