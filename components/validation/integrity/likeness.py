"""How much of the source's layer stands in the stored one, by output channel, by input channel and by block.

Beside the error there is the gain, the source's part in what is stored: <stored, source> / <source, source>. Rounding
errors leave it at 1, whatever their size, and a wrong scale moves it by as much as the scale is wrong.

Each is found in two senses. Plain, where all weights count alike: what rounding to nearest keeps small. And by outputs,
where weights count by what they add to the layer's output on calibration text, all of them together: what GPTQ keeps
small, which lets weights make up for the errors of others wherever their inputs go together, and may move these far.
What is near its source in either sense is an export as its method makes it; a wrong scale is far in both.

Outputs are compared by a sketch of the inputs (`observe.InputStatistics`), a few rows S of which the mean of SᵀS is
their Gram matrix. So what one weight adds is told with an error, which the others' rounding makes: it is small where
the weight matters, and so a block or an input channel that adds little is judged by its share and not by its own size.
What most inputs have in common is judged by output channels and not by blocks: any of these may make up for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.layer_layout import Quantized

#: Of the root mean square of all channels or blocks: smaller ones are too small to judge by their own size. A block is
#: sooner than a channel, for GPTQ may put into it what others of its output channel lack.
LEAST_CHANNEL, LEAST_BLOCK, LEAST_INPUT = 0.01, 0.1, 0.5
#: Directions that most inputs have in common: in these blocks are not judged by outputs. Above all it is what is alike
#: for all tokens, such as what a head puts out that attends to the first one: GPTQ makes a bias of its weights.
COMMON = 8
#: What an input counts at least in a block or an input channel by outputs, in units of what is typical of inputs: what
#: calibration never saw may come all the same.
LEAST_MOMENT = 0.25
#: Numbers of a part of a layer: on a CPU float32 of it stay in the cache while they are summed, 2 MiB; on a GPU a part
#: is large enough that launching kernels is no share of the time.
_PART = {"cpu": 2**19, "cuda": 2**26}


@dataclass(frozen=True)
class Sense:
    """Sums of one sense, float32. A layer whose weights share no scale along a row has one block.

    Of each block, [out, blocks], of each output channel, [out], and of each input channel, [in], there are
    <stored - source, source> as `change` and <source, source> as `own`; of an output channel also the `squares` of its
    error. By outputs, its parts have these only together, so its own are no sum of theirs.
    """

    by_outputs: bool
    block_change: torch.Tensor
    block_own: torch.Tensor
    change: torch.Tensor
    own: torch.Tensor
    squares: torch.Tensor
    input_change: torch.Tensor
    input_own: torch.Tensor

    @property
    def error(self) -> torch.Tensor:
        """The relative error of the whole layer."""
        return (self.squares.sum() / self.own.sum().clamp_min(1e-30)).sqrt()

    @property
    def errors(self) -> torch.Tensor:
        """The relative error of each output channel."""
        least = LEAST_CHANNEL**2 * self.own.mean()
        return (self.squares / self.own.clamp_min(least).clamp_min(1e-30)).sqrt()

    @property
    def rows(self) -> torch.Tensor:
        """How far the gain of each output channel is from 1; 0 where too little stands to be judged."""
        return departure(self.change, self.own, LEAST_CHANNEL)

    @property
    def blocks(self) -> torch.Tensor:
        """How far the gain of each block is from 1, and by outputs of one that adds less than is typical of its output
        channel, what part of that it has changed; 0 where too little stands to be judged."""
        if not self.by_outputs:
            return departure(self.block_change, self.block_own, LEAST_BLOCK)
        part = share(self.block_own, self.block_own.mean(1, keepdim=True))
        return departure(self.block_change, self.block_own, 0) * part.where(part > LEAST_BLOCK, 0.0)

    @property
    def inputs(self) -> torch.Tensor:
        """How far the gain of each input channel is from 1; 0 where too little stands to be judged, and by outputs of
        one that adds less than is typical what part of that it has changed."""
        if self.by_outputs:
            return departure(self.input_change, self.input_own, 0) * share(self.input_own, self._typical_input)
        return departure(self.input_change, self.input_own, LEAST_INPUT)

    @property
    def input_distance(self) -> torch.Tensor:
        """How far from 1 the gains of input channels are, as root of the mean square.

        Each is counted by its own, up to the mean: where a few have most of a layer's weight, as those from which a
        model makes its massive activations, they would speak for all others. Nor do they hide others by making these
        small beside the mean: what is too small is told by the mean of norms, which they hardly change.
        """
        judged = self.input_own > LEAST_INPUT**2 * self._typical_input
        distance = torch.where(judged, self.input_change / self.input_own, 0.0)
        counted = self.input_own.where(judged, 0.0).clamp_max(self.input_own.mean())
        return (distance.square().mul(counted).sum() / counted.sum().clamp_min(1e-30)).sqrt()

    @property
    def _typical_input(self) -> torch.Tensor:
        return self.input_own.sqrt().mean().square()


@dataclass(frozen=True)
class Likeness:
    """What a stored layer has of its source; `outputs` is None where nothing is known of its inputs."""

    plain: Sense
    outputs: Sense | None

    @property
    def senses(self) -> list[Sense]:
        """The plain one first."""
        return [sense for sense in (self.plain, self.outputs) if sense]

    @property
    def cosine(self) -> float:
        """Between stored and source weights."""
        own, change = self.plain.own.sum(), self.plain.change.sum()
        stored = (self.plain.squares.sum() + 2 * change + own).clamp_min(0)
        return ((own + change) / (stored * own).sqrt().clamp_min(1e-30)).item()


def departure(change: torch.Tensor, own: torch.Tensor, least: float) -> torch.Tensor:
    """Returns how far a gain is from 1, signed; 0 where the source has less than `least` of the root mean square."""
    return torch.where(own > least**2 * own.mean(), change / own, 0.0)


def share(own: torch.Tensor, typical: torch.Tensor) -> torch.Tensor:
    """Returns what part of what is typical there is, by norm, and at most 1."""
    return (own / typical.clamp_min(1e-30)).sqrt().clamp_max(1)


def measure(
    layer: Quantized, source: torch.Tensor, change: torch.Tensor | None = None, sketch: torch.Tensor | None = None
) -> Likeness:
    """Compares a stored layer with the weight that it was made from, a part of its rows at a time.

    Args:
        layer: as stored; its own `pre_quant_scale` is not applied.
        source: the weight, floating point [out, in], on the layer's device.
        change: what the layer's input is multiplied by, by which its weights were divided, float32 [in]; 0 of channels
            whose weights cannot be told. None where the input is the source's.
        sketch: of the source's input, floating point [rows, in]; None where it is not known.
    """
    rows, columns = source.shape
    undone = None if change is None else torch.where(change == 0, 0.0, 1 / change)
    size = layer.layout.group_size or columns
    part = max(2, _PART[source.device.type] // columns // 2 * 2)  # two rows of INT4 share their bytes
    plain, outputs = _Plain(size), None
    if sketch is not None:
        seen = sketch.float() if change is None else sketch.float() * change
        outputs = _ByOutputs(size, seen) if seen.any() else None
    for begin in range(0, rows, part):
        stored_OI = layer_layout.scaled_weight(_rows(layer, begin, begin + part))
        weight_OI = source[begin : begin + part].float()
        if undone is not None:
            weight_OI = weight_OI * undone
            stored_OI = stored_OI.where(undone != 0, 0.0)
        error_OI = stored_OI.sub_(weight_OI)
        plain.add(error_OI, weight_OI)
        if outputs:
            outputs.add(error_OI, weight_OI)
    return Likeness(plain.sense(), outputs.sense() if outputs else None)


class _Plain:
    """Sums the parts of a layer where all weights count alike.

    Args:
        size: numbers of a block.
    """

    by_outputs = False

    def __init__(self, size: int):
        self.size, self._rows, self._inputs = size, [], []

    def add(self, error_OI: torch.Tensor, weight_OI: torch.Tensor) -> None:
        # Sums of products, not products of matrices: along short blocks these would be millions of tiny ones.
        change_OI, own_OI = error_OI * weight_OI, weight_OI.square()
        change, own = self._by_block(change_OI), self._by_block(own_OI)
        self._rows.append((change, own, change.sum(1), own.sum(1), error_OI.square().sum(1)))
        self._inputs.append((change_OI.sum(0), own_OI.sum(0)))

    def sense(self) -> Sense:
        rows = map(torch.cat, zip(*self._rows, strict=True))
        inputs = (torch.stack(parts).sum(0) for parts in zip(*self._inputs, strict=True))
        return Sense(self.by_outputs, *rows, *inputs)

    def _by_block(self, each_OI: torch.Tensor) -> torch.Tensor:
        return each_OI.unflatten(1, (-1, self.size)).sum(-1)


class _ByOutputs(_Plain):
    """Sums the parts of a layer where weights count by what they add to its outputs.

    Args:
        sketch: of the input, float32 [rows, in].
    """

    by_outputs = True

    def __init__(self, size: int, sketch: torch.Tensor):
        super().__init__(size)
        moment = sketch.square().sum(0)
        self._sketch, self._least = sketch, LEAST_MOMENT * moment.sqrt().mean().square()
        self._moment = moment + self._least
        self._grams = None
        if sketch.shape[1] > size:
            each = sketch / self._moment.sqrt()
            self._common_SC = torch.linalg.eigh(each @ each.T).eigenvectors[:, -COMMON:]  # eigenvalues ascend
            common_CI = self._common_SC.T @ sketch
            own = (sketch - self._common_SC @ common_CI).unflatten(1, (-1, size)).transpose(0, 1)
            self._grams = own.mT @ own  # of each block, [blocks, size, size]
            self._common = common_CI.unflatten(1, (-1, size)).permute(1, 2, 0)  # [blocks, size, COMMON]

    def add(self, error_OI: torch.Tensor, weight_OI: torch.Tensor) -> None:
        error_OS, weight_OS = error_OI @ self._sketch.T, weight_OI @ self._sketch.T
        change_OI = torch.addmm(self._least * error_OI, error_OS, self._sketch).mul_(weight_OI)
        squared_OI, own = weight_OI.square(), weight_OS.square().sum(1)
        block_change, block_own = self._by_block(change_OI), own[:, None]
        if self._grams is not None:
            blocks = weight_OI.unflatten(1, (-1, self.size)).transpose(0, 1)
            block_own = ((blocks @ self._grams) * blocks).sum(-1).T
            block_change -= ((blocks @ self._common) * (error_OS @ self._common_SC)).sum(-1).T
        block_own = block_own + self._least * self._by_block(squared_OI)
        change = (error_OS * weight_OS).sum(1)
        self._rows.append((block_change, block_own, change, own, error_OS.square().sum(1)))
        self._inputs.append((change_OI.sum(0), squared_OI.sum(0) * self._moment))


def nearest(distances: Sequence[torch.Tensor]) -> tuple[float, int]:
    """Returns how far the worst place is, in the sense in which it is nearest, and the number of the place."""
    least = torch.stack([each.abs().nan_to_num(torch.inf) for each in distances]).amin(0).flatten()
    worst = int(least.argmax())
    return least[worst].item(), worst


def _rows(layer: Quantized, begin: int, end: int) -> Quantized:
    """Returns some rows of a layer, from an even one on."""
    storage, scale = layer.layout.storage, layer.weight_scale
    halved = 2 if storage.number.packed == "out" else 1
    if storage.scale != "tensor":
        scale = scale.reshape(layer.shape[0], -1)[begin:end]
    return replace(layer, weight=layer.weight[begin // halved : -(-end // halved)], weight_scale=scale)
