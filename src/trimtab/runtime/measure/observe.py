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


def linears(model: nn.Module, numbers: Sequence[int] | None = None) -> dict[str, nn.Linear]:
    """Returns the linear layers inside the blocks, or those of these numbers, by name: embeddings, the output head and
    routers are left out."""
    family, all_blocks = family_of(model), blocks(model)
    found = {}
    for number in range(len(all_blocks)) if numbers is None else numbers:
        for name, module in all_blocks[number].named_modules(prefix=f"{family.blocks}.{number}"):
            if isinstance(module, nn.Linear) and family.layer(name) is not None:
                found[name] = module
    return found


def linear_groups(model: nn.Module, numbers: Sequence[int] | None = None) -> list[Group]:
    """Returns the linear layers inside the blocks, or those of these numbers, in groups that read the same input."""
    return groups(linears(model, numbers), family_of(model).model_type)


def batches(device: torch.device, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the windows, int64 [samples, length], in batches [n, length] on a device.

    A GPU gets eight windows at a time: what is measured beside the products is many small kernels, whose launches
    would take longer than the work of one window.
    """
    return tokens.to(device).split(8 if device.type == "cuda" else 1)


#: What `Observation.tensors` has one value of for each block.
BY_BLOCK = ("block_influence", "key_amax", "value_amax")


#: Rows of a sketch. What a block of weights adds to an output is told with an error of that output's relative error
#: times the root of blocks over rows.
SKETCH = 128
#: The norm that an input has at most in a sketch, in units of the median: where one token's is a hundred times that of
#: others, what a layer does for all others would not be seen beside it.
_LOUDEST = 16


class InputStatistics:
    """Running maximum and second moment of a layer's input, a value a channel: float32 [in_features]; and a sketch of
    it, float32 [SKETCH, in_features]: sums of all inputs, each row with signs of its own drawn by chance, so that
    S transposed times S is in the mean the Gram matrix, which is too large to be kept (Achlioptas 2003).

    Squares are summed in float32 within a window and in float64 over windows.
    """

    def __init__(self, channels: int, device: torch.device):
        self.amax = torch.zeros(channels, device=device)
        self.square_sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self.signed_sum = torch.zeros(SKETCH, channels, device=device)
        self.rows = 0
        self._random = torch.Generator(device).manual_seed(0)

    def add(self, activations: torch.Tensor) -> None:
        rows = activations.detach().flatten(0, -2)
        torch.maximum(self.amax, torch.linalg.vector_norm(rows, torch.inf, dim=0).float(), out=self.amax)
        self.square_sum += torch.linalg.vector_norm(rows, 2, dim=0, dtype=torch.float32).square()
        if len(rows):
            # Rounded to the activations' type, which is far less than what chance does.
            self.signed_sum += self._signs(activations.detach()).T @ rows
        self.rows += len(rows)

    def _signs(self, activations: torch.Tensor) -> torch.Tensor:
        """Draws what each input counts in each row of the sketch, [inputs, SKETCH]."""
        norms = _norms(activations)
        loudest = _LOUDEST * norms.median(-1, keepdim=True).values  # of its window, whatever others there are
        counts = torch.where(norms > loudest, loudest / norms, 1.0).to(activations.dtype)
        # Bits of whole numbers: a tenth of the time that drawing each sign by itself takes.
        words = torch.empty(norms.numel(), SKETCH // 32, 1, dtype=torch.int64, device=activations.device)
        words.random_(0, 2**32, generator=self._random)
        bits = (words >> torch.arange(32, device=activations.device) & 1).flatten(1)
        return bits.to(activations.dtype).mul_(2).sub_(1).mul_(counts.flatten()[:, None])

    @property
    def sketch(self) -> torch.Tensor:
        return self.signed_sum / max(self.rows * SKETCH, 1) ** 0.5

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


class WatchedCache(DynamicCache):
    """A KV cache that shows what is put into it: behind a sliding window it keeps no more than the last tokens."""

    def __init__(self, model: nn.Module, ranges: Mapping[int, CacheRange]):
        super().__init__(config=model.config)
        self._ranges = ranges

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        self._ranges[layer_idx].add(key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Observation:
    """What passes tell of a model's blocks, or of those of these numbers: by the first layer of each group, and by
    block.

    Nothing of it is read before the end, and then in one copy: each would make a GPU wait.
    """

    def __init__(self, model: nn.Module, numbers: Sequence[int] | None = None):
        self.numbers = list(range(len(blocks(model))) if numbers is None else numbers)
        layers = linears(model, self.numbers)
        self.groups = linear_groups(model, self.numbers)
        device = next(blocks(model)[self.numbers[0]].parameters()).device
        self.inputs = {g.layers[0]: InputStatistics(layers[g.layers[0]].in_features, device) for g in self.groups}
        self.similarities = {number: Similarity(device) for number in self.numbers}
        self.caches = {number: CacheRange(device) for number in self.numbers}

    def run(self, model: nn.Module, windows: torch.Tensor) -> None:
        """Passes windows of tokens, int64 [n, length], through the observed model."""
        if isinstance(family_of(model).attention, NoAttention):
            model(windows, use_cache=False, logits_to_keep=1)
        else:
            model(windows, past_key_values=WatchedCache(model, self.caches), use_cache=True, logits_to_keep=1)

    def rows(self, layer: str) -> int:
        """Returns how many tokens a layer has seen, by the name of the first of its group; 0 for others."""
        return self.inputs[layer].rows if layer in self.inputs else 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns `<layer>.amax` and `<layer>.second_moment`, float32 [in_features], for every linear layer;
        `<layer>.sketch`, bfloat16 [SKETCH, in_features], for the first of each group that reads the same input; and
        for the blocks, float32 [blocks], `block_influence` and the largest `key_amax` and `value_amax`, which are 0 of
        a block without keys."""
        caches = [self.caches[number] for number in self.numbers]
        ends = [1 - torch.stack([self.similarities[number].mean for number in self.numbers]).float()]
        ends += [torch.stack([c.key for c in caches]), torch.stack([c.value for c in caches])]
        parts = [tensor for seen in self.inputs.values() for tensor in (seen.amax, seen.second_moment)] + ends
        copied = iter(torch.cat(parts).cpu().split([len(part) for part in parts]))
        found: dict[str, torch.Tensor] = {}  # layers first: of what overflows, the earliest one is named
        for group in self.groups:
            amax, second_moment = next(copied), next(copied)
            for layer in group.layers:
                found |= {f"{layer}.amax": amax.clone(), f"{layer}.second_moment": second_moment.clone()}
            found[f"{group.layers[0]}.sketch"] = self.inputs[group.layers[0]].sketch.bfloat16().cpu()
        return found | {name: next(copied).clone() for name in BY_BLOCK}


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
def observed(model: nn.Module, numbers: Sequence[int] | None = None) -> Iterator[Observation]:
    """Measures the inputs of linear layers and the influence of blocks, or of those of these numbers, while the body
    runs the model."""
    seen = Observation(model, numbers)

    def compare(block: int) -> Callable[..., None]:
        def hook(_, args, kwargs, output) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            seen.similarities[block].add(before, output[0] if isinstance(output, tuple) else output)

        return hook

    every = blocks(model)
    handles = [every[n].register_forward_hook(compare(n), with_kwargs=True) for n in seen.numbers]
    layers = linears(model, seen.numbers)
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
    handles = [
        m.register_forward_pre_hook(lambda _, args, s=sums[n]: add_product(s, args[0], args[0]))
        for n, m in layers.items()
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def add_product(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds the sum of x yᵀ over rows to float32 [in, in].

    Products of bfloat16 numbers are exact in float32, in which a GPU's tensor cores add them up ten times as fast as it
    multiplies float32.

    Args:
        left, right: floating point [..., in]; x and y of one row stand in the same place.
    """
    x, y = (rows.detach().flatten(0, -2) for rows in (left, right))
    if x.device.type == "cuda" and x.dtype == y.dtype == torch.bfloat16:
        sums += torch.mm(x.t(), y, out_dtype=torch.float32)
    else:
        x = x.float()
        sums.addmm_(x.t(), x if right is left else y.float())
