"""What flows through a model while it runs on calibration tokens: one pass, one measurement for each kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from trimtab.base.errors import Failure
from trimtab.families import NoAttention
from trimtab.families.fusion import Group, groups
from trimtab.runtime.checkpoint.skeleton import family_of


def blocks(model: nn.Module) -> nn.ModuleList:
    """Returns the transformer blocks, which stand where the model's family says."""
    return model.get_submodule(family_of(model).blocks)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linear layers inside the blocks by name: embeddings, the output head and routers are left out."""
    family = family_of(model)
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and family.layer(n) is not None}


def linear_groups(model: nn.Module) -> list[Group]:
    """Returns the linear layers inside the blocks, in the groups that read the same input."""
    return groups(linears(model), family_of(model).model_type)


def batches(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the windows, int64 [samples, length], in batches [n, length] on the model's device.

    A GPU gets eight windows at a time: what is measured beside the products is many small kernels, whose launches
    would take longer than the work of one window.
    """
    return tokens.to(model.device).split(8 if model.device.type == "cuda" else 1)


class InputStatistics:
    """Running maximum and second moment of a layer's input, a value a channel: float32 [in_features].

    Squares are summed in float32 within a window and in float64 over windows.
    """

    def __init__(self, channels: int, device: torch.device):
        self.amax = torch.zeros(channels, device=device)
        self.square_sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, activations: torch.Tensor) -> None:
        rows = activations.detach().flatten(0, -2)
        torch.maximum(self.amax, torch.linalg.vector_norm(rows, torch.inf, dim=0).float(), out=self.amax)
        self.square_sum += torch.linalg.vector_norm(rows, 2, dim=0, dtype=torch.float32).square()
        self.rows += len(rows)

    @property
    def second_moment(self) -> torch.Tensor:
        return (self.square_sum / max(self.rows, 1)).float()


class Similarity:
    """Running mean of the cosine between a block's input and output, over tokens.

    Products are rounded to the activations' type and summed in float32: rounding is as often up as down, and nothing
    as large as the activations is made in float32, which would cost more than all other statistics.
    """

    def __init__(self, device: torch.device):
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        a, b = before.detach(), after.detach()
        products = (a * b).sum(-1, dtype=torch.float32)
        self.total += (products / (_norms(a) * _norms(b)).clamp_min(1e-30)).sum()
        self.tokens += before.shape[:-1].numel()

    @property
    def mean(self) -> torch.Tensor:
        return self.total / max(self.tokens, 1)


def _norms(rows: torch.Tensor) -> torch.Tensor:
    """Returns the length of each row, float32."""
    return torch.linalg.vector_norm(rows, 2, dim=-1, dtype=torch.float32)


class CacheRange:
    """Running largest magnitude of a block's keys, behind their rotary embedding, and values, of all tokens."""

    def __init__(self, device: torch.device):
        self.key, self.value = torch.zeros((), device=device), torch.zeros((), device=device)

    def add(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key = torch.maximum(self.key, key.abs().amax().float())
        self.value = torch.maximum(self.value, value.abs().amax().float())


class _WatchedCache(DynamicCache):
    """A KV cache that shows what is put into it: behind a sliding window it keeps no more than the last tokens."""

    def __init__(self, model: nn.Module, ranges: Sequence[CacheRange]):
        super().__init__(config=model.config)
        self._ranges = ranges

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        self._ranges[layer_idx].add(key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Observation:
    """What one pass tells of a model: by the first layer of each group, and by block.

    Nothing of it is read before the end, and then in one copy: each would make a GPU wait.
    """

    def __init__(self, model: nn.Module):
        layers = linears(model)
        self.groups = linear_groups(model)
        device = next(model.parameters()).device
        self.inputs = {g.layers[0]: InputStatistics(layers[g.layers[0]].in_features, device) for g in self.groups}
        self.similarities = [Similarity(device) for _ in blocks(model)]
        self.caches = [CacheRange(device) for _ in blocks(model)]

    def run(self, model: nn.Module, windows: torch.Tensor) -> None:
        """Passes windows of tokens, int64 [n, length], through the observed model."""
        if isinstance(family_of(model).attention, NoAttention):
            model(windows, use_cache=False, logits_to_keep=1)
        else:
            model(windows, past_key_values=_WatchedCache(model, self.caches), use_cache=True, logits_to_keep=1)

    def rows(self, layer: str) -> int:
        """Returns how many tokens a layer has seen, by the name of the first of its group; 0 for others."""
        return self.inputs[layer].rows if layer in self.inputs else 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns `<layer>.amax` and `<layer>.second_moment`, float32 [in_features], for every linear layer;
        and for the blocks, float32 [blocks], `block_influence` and the largest `key_amax` and `value_amax`, which are 0
        of a block without keys."""
        ends = [1 - torch.stack([s.mean for s in self.similarities]).float()]
        ends += [torch.stack([c.key for c in self.caches]), torch.stack([c.value for c in self.caches])]
        parts = [tensor for seen in self.inputs.values() for tensor in (seen.amax, seen.second_moment)] + ends
        copied = iter(torch.cat(parts).cpu().split([len(part) for part in parts]))
        found: dict[str, torch.Tensor] = {}  # layers first: of what overflows, the earliest one is named
        for group in self.groups:
            amax, second_moment = next(copied), next(copied)
            for layer in group.layers:
                found |= {f"{layer}.amax": amax.clone(), f"{layer}.second_moment": second_moment.clone()}
        return found | {name: next(copied).clone() for name in ("block_influence", "key_amax", "value_amax")}


def check_finite(measured: dict[str, torch.Tensor]) -> None:
    """Raises a Failure, `unsupported`, that names the first measurement with a value that is not finite."""
    # A finite sum has finite parts, and costs a tenth of looking at each; a sum that overflowed itself is looked at.
    suspects = (name for name, tensor in measured.items() if not math.isfinite(tensor.sum()))
    for name in suspects:
        if not torch.isfinite(measured[name]).all():
            raise Failure(
                "unsupported",
                f"{name} is not finite: the model's activations overflow on the calibration text; download it "
                f"again, or check how it was trained",
            )


@contextmanager
def observed(model: nn.Module) -> Iterator[Observation]:
    """Measures the inputs of linear layers and the influence of blocks while the body runs the model."""
    seen = Observation(model)

    def compare(block: int) -> Callable[..., None]:
        def hook(_, args, kwargs, output) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            seen.similarities[block].add(before, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [b.register_forward_hook(compare(i), with_kwargs=True) for i, b in enumerate(blocks(model))]
    layers = linears(model)
    for first, statistics in seen.inputs.items():
        handles.append(layers[first].register_forward_pre_hook(lambda _, args, s=statistics: s.add(args[0])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def grams(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, torch.Tensor]]:
    """Sums x xᵀ over the inputs of the layers while the body runs the model: float32 [in, in] each."""
    sums = {n: torch.zeros(m.in_features, m.in_features, device=m.weight.device) for n, m in layers.items()}

    def add(name: str, activations: torch.Tensor) -> None:
        rows = activations.detach().flatten(0, -2).float()
        sums[name].addmm_(rows.t(), rows)

    handles = [m.register_forward_pre_hook(lambda _, a, n=n: add(n, a[0])) for n, m in layers.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
