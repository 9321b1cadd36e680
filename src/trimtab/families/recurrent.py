"""The part of a block that stands for attention, or beside it, and keeps a state: a recurrent mixer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from trimtab.families.parts import Config, Layer, Shape, SharedInput, within


class State(NamedTuple):
    """What a recurrent mixer keeps of a sequence, however long: the last inputs of its convolution, in 16 bits, and
    the numbers of its recurrence, in float32, as their errors would add up."""

    window: int
    recurrence: int = 0

    @property
    def bytes(self) -> int:
        return 2 * self.window + 4 * self.recurrence


@dataclass(frozen=True)
class Recurrent:
    """A mixer of tokens with a state of fixed size: a gated delta net, a short convolution, a Mamba.

    Its convolution, decays and time steps are no linear layers, and are never rounded.

    Attributes:
        module: of the block.
        norm: as in `SharedInput`.
        projections: layers that read the block's input.
        output: the layer behind the recurrence.
        choices: layers within, each of which reads what the one before made: by them a Mamba of the first kind forgets.
        state: from a config.
        shapes: of all its tensors by their names in it, from a config with the family's `sizes`.
        blocks: which blocks have one, from such a config.
        beside_attention: whether these have attention too.
        holds_states: whether a layer without kernels holds a state for every token that it reads.
    """

    module: str
    state: Callable[[Config], State]
    shapes: Callable[[Config], Mapping[str, Shape]]
    norm: str | None = "input_layernorm"
    projections: tuple[str, ...] = ("in_proj",)
    output: str = "out_proj"
    choices: tuple[str, ...] = ()
    blocks: Callable[[Config], Sequence[int]] = field(default=lambda config: range(config["num_hidden_layers"]))
    beside_attention: bool = False
    holds_states: bool = False

    @property
    def inputs(self) -> tuple[SharedInput, ...]:
        """What the first layers read, what those within read, and what the last one reads."""
        first = tuple(Layer(within(self.module, name), "mixer_in", "hidden") for name in self.projections)
        middle = []
        for number, name in enumerate(self.choices):
            sides = ("mixer_choice", "mixer") if number == 0 else ("mixer", "mixer_choice")
            middle.append(SharedInput((Layer(within(self.module, name), *sides),)))
        last = SharedInput((Layer(within(self.module, self.output), "hidden", "mixer"),))
        return SharedInput(first, self.norm), *middle, last


def listed(config: Config) -> list[int] | None:
    """Returns the blocks that `layer_types` says have no attention; None where a config has no such list."""
    kinds = config.get("layer_types")
    return kinds and [block for block, kind in enumerate(kinds) if kind not in ("full_attention", "attention")]
