"""How much of the source's layer stands in the stored one, by output channel, by input channel and by block.

Beside the error there is the gain, the source's part in what is stored: <stored, source> / <source, source>. Rounding
errors leave it at 1, whatever their size, and a wrong scale moves it by as much as the scale is wrong.

Each is found in two senses. Plain, where all weights count alike: what rounding to nearest keeps small. And as inputs
weigh it, where a weight counts by the second moment of its input: what GPTQ keeps small, which lets weights of inputs
that matter little make up for the errors of others, and may move these far. What is near its source in either sense is
an export as its method makes it; a wrong scale is far in both.

Gains have a third sense where calibration saw massive inputs, those of a few tokens: plain, but for the weights of such
inputs. They are large together, so GPTQ may take from one what it gives to another, and in either other sense these few
would speak for a whole output channel. A wrong scale of that is far in this sense too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.layer_layout import Quantized

#: Of the root mean square of all channels or blocks: smaller ones are too small to judge by their own size. A block is
#: sooner than a channel, for GPTQ may put into it what others of its output channel lack.
LEAST_CHANNEL, LEAST_BLOCK, LEAST_INPUT = 0.01, 0.1, 0.5
#: Inputs with so many times the mean second moment are massive. SmolLM2's block 11 has two, with 190 and 360 times.
MASSIVE = 32
#: What an input counts at least, in units of the mean: what calibration never saw may come all the same.
LEAST_MOMENT = 0.1
#: Numbers of a part of a layer: on a CPU float32 of it stay in the cache while they are summed, 2 MiB; on a GPU a part
#: is large enough that launching kernels is no share of the time.
_PART = {"cpu": 2**19, "cuda": 2**26}


@dataclass(frozen=True)
class Sense:
    """Sums of one sense: <stored, source> and <source, source> of each block, float32 [out, blocks], and the squared
    error of each output channel, [out]. A layer whose weights share no scale along a row has one block."""

    dot: torch.Tensor
    own: torch.Tensor
    squares: torch.Tensor

    @property
    def error(self) -> torch.Tensor:
        """The relative error of the whole layer."""
        return (self.squares.sum() / self.own.sum().clamp_min(1e-30)).sqrt()

    @property
    def errors(self) -> torch.Tensor:
        """The relative error of each output channel."""
        own = self.own.sum(1)
        return (self.squares / own.clamp_min(LEAST_CHANNEL**2 * own.mean()).clamp_min(1e-30)).sqrt()

    @property
    def gains(self) -> torch.Tensor:
        """The gain of each output channel, 1 where too little stands to be judged."""
        return gain(self.dot.sum(1), self.own.sum(1), LEAST_CHANNEL)

    @property
    def block_gains(self) -> torch.Tensor:
        """The gain of each block, 1 where too little stands to be judged."""
        return gain(self.dot, self.own, LEAST_BLOCK)

    @property
    def block_changes(self) -> torch.Tensor:
        """By what part of its output channel's typical block each block has changed along its source: less than by its
        own size, where it is smaller than the others."""
        typical = self.own.mean(1, keepdim=True).clamp_min(1e-30)
        return 1 + (self.block_gains - 1) * (self.own / typical).sqrt().clamp_max(1)


@dataclass(frozen=True)
class Likeness:
    """What a stored layer has of its source. `weighted` is None where nothing is known of its inputs. Where some of
    these are massive, `ordinary` is plain but for them, and `massive` what they count, 0 for others, float32 [in]; else
    None. Of each input channel there are <stored, source> and <source, source>, float32 [in]."""

    plain: Sense
    weighted: Sense | None
    ordinary: Sense | None
    massive: torch.Tensor | None
    input_dot: torch.Tensor
    input_own: torch.Tensor

    @property
    def wholes(self) -> list[Sense]:
        """The senses of all weights."""
        return [sense for sense in (self.plain, self.weighted) if sense]

    @property
    def senses(self) -> list[Sense]:
        """All senses, the plain one first."""
        return [*self.wholes, *([self.ordinary] if self.ordinary else [])]

    @property
    def inputs(self) -> torch.Tensor:
        """The gain of each input channel, 1 where too little stands to be judged; massive ones have one together."""
        gains = gain(self.input_dot, self.input_own, LEAST_INPUT)
        if self.massive is None:
            return gains
        together = (self.massive * self.input_dot).sum() / (self.massive * self.input_own).sum().clamp_min(1e-30)
        return torch.where(self.massive > 0, together, gains)

    @property
    def input_distance(self) -> torch.Tensor:
        """How far from 1 the gains of input channels are, as root of the mean square.

        Each is counted by the squares of its weights, up to their mean: where a few have most of a layer's weight, as
        those from which a model makes its massive activations, they would speak for all others. Such channels are large
        for the same tokens, so GPTQ may take from one what it gives to another. Nor do they hide others by making these
        small beside the mean: what is too small is told by the mean of norms, which they hardly change.
        """
        own, typical = self.input_own, self.input_own.sqrt().mean().square()
        judged = own > LEAST_INPUT**2 * typical
        distance = torch.where(judged, self.input_dot / own - 1, 0.0)
        counted = own.where(judged, 0.0).clamp_max(own.mean())
        return (distance.square().mul(counted).sum() / counted.sum().clamp_min(1e-30)).sqrt()

    @property
    def cosine(self) -> float:
        """Between stored and source weights."""
        plain = self.plain
        dot, own = plain.dot.sum(), plain.own.sum()
        stored = (plain.squares.sum() + 2 * dot - own).clamp_min(0)
        return (dot / (stored * own).sqrt().clamp_min(1e-30)).item()


def gain(dot: torch.Tensor, own: torch.Tensor, least: float) -> torch.Tensor:
    """Returns <stored, source> / <source, source>, 1 where the source has less than `least` of the root mean square."""
    return torch.where(own > least**2 * own.mean(), dot / own, 1.0)


def importance(moment: torch.Tensor, change: torch.Tensor) -> torch.Tensor | None:
    """Returns what each input counts, in units of the mean, float32 [in]; None where calibration saw no input.

    Args:
        moment: second moment of the layer's input before `change`, float32 [in].
        change: what the input is multiplied by since then, 0 where it is never anything but zero.
    """
    seen = moment * change.square()
    mean = seen.mean()
    return seen / mean + LEAST_MOMENT if mean > 0 and torch.isfinite(mean) else None


def measure(
    layer: Quantized, source: torch.Tensor, change: torch.Tensor | None, counts: torch.Tensor | None
) -> Likeness:
    """Compares a stored layer with the weight that it was made from, a part of its rows at a time.

    Args:
        layer: as stored; its own `pre_quant_scale` is not applied.
        source: the weight, floating point [out, in], on the layer's device.
        change: what the layer's input is multiplied by, by which its weights were divided, float32 [in]; 0 of channels
            whose weights cannot be told. None where the input is the source's.
        counts: as `importance` returns it.
    """
    rows, columns = source.shape
    undone = None if change is None else torch.where(change == 0, 0.0, 1 / change)
    blocks = (-1, layer.layout.group_size or columns)
    part = max(2, _PART[source.device.type] // columns // 2 * 2)  # two rows of INT4 share their bytes
    weighings: dict[str, torch.Tensor | None] = {"plain": None}
    massive = None
    if counts is not None:
        weighings["weighted"] = counts
        if (counts > MASSIVE).any():
            massive = counts.where(counts > MASSIVE, 0.0)
            weighings["ordinary"] = (massive == 0).float()
    found: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in weighings}
    input_dot, input_own = (torch.zeros(columns, device=source.device) for _ in range(2))
    for begin in range(0, rows, part):
        stored_OI = layer_layout.scaled_weight(_rows(layer, begin, begin + part))
        weight_OI = source[begin : begin + part].float()
        if undone is not None:
            weight_OI = weight_OI * undone
            stored_OI = stored_OI.where(undone != 0, 0.0)
        # Sums of products, not products of matrices: along short blocks these would be millions of tiny ones.
        dot_OI, own_OI = stored_OI * weight_OI, weight_OI.square()
        squares_OI = stored_OI.sub_(weight_OI).square_()
        input_dot += dot_OI.sum(0)
        input_own += own_OI.sum(0)
        for name, by in weighings.items():
            each = [t if by is None else t * by for t in (dot_OI, own_OI, squares_OI)]
            sums = (each[0].unflatten(1, blocks).sum(-1), each[1].unflatten(1, blocks).sum(-1), each[2].sum(1))
            found[name].append(sums)
    senses = {name: Sense(*map(torch.cat, zip(*parts, strict=True))) for name, parts in found.items()}
    return Likeness(senses["plain"], senses.get("weighted"), senses.get("ordinary"), massive, input_dot, input_own)


def _rows(layer: Quantized, begin: int, end: int) -> Quantized:
    """Returns some rows of a layer, from an even one on."""
    storage, scale = layer.layout.storage, layer.weight_scale
    halved = 2 if storage.number.packed == "out" else 1
    if storage.scale != "tensor":
        scale = scale.reshape(layer.shape[0], -1)[begin:end]
    return replace(layer, weight=layer.weight[begin // halved : -(-end // halved)], weight_scale=scale)
