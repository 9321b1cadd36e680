"""What a family of decoders is: where its layers stand, which of them read one input, and what may be asked of it.

A block is attention, or a recurrent mixer in its place, and an MLP, or a mixture of experts in its place; each is
described by a class of its own that says which linear layers it has (`trimtab.families.parts`), and whatever else has
to know the names of layers asks `Family`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from trimtab.families.parts import (
    Attention,
    Config,
    Experts,
    LatentAttention,
    Layer,
    Mlp,
    NoAttention,
    Norm,
    Said,
    Shape,
    SharedInput,
)
from trimtab.families.recurrent import Recurrent
from trimtab.families.wrapper import Wrapper

#: The number of an expert, within the name of a module in its block.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Limit(NamedTuple):
    """A setting of config.json with which the family is not described: `value` tells whether this is one.

    `default` is transformers' value where a config.json lacks the field; `reason` says why, after "is 30.0, and".
    """

    field: str
    default: Any
    known: tuple[Any, ...]
    reason: str


class Logits(NamedTuple):
    """What becomes of the output head's products: multiplied by `scale`, then `cap` * tanh(logits / `cap`)."""

    scale: float = 1.0
    cap: float | None = None


@dataclass(frozen=True)
class Family:
    """One kind of decoder, by the names of its checkpoint.

    Whoever runs it finds transformers' modules under these names too (`runtime.checkpoint.skeleton`).

    Attributes:
        model_type: as config.json says it.
        attention, mlp: the two parts of a block; `mlp` is None where each block has experts, or nothing.
        experts: what stands in the place of the MLP in all blocks or some.
        recurrent: what stands in the place of attention in all blocks or some.
        norm: what the norms of a block multiply by.
        blocks: the list of blocks.
        embedding, last_norm, head: the modules before and behind them; the head's weights may be the embedding's.
        norms: the norms of a block, which have a weight for each hidden channel.
        depth: the field of config.json that counts the blocks.
        logits: what becomes of the head's products, from a config.
        limits: settings of config.json with which a model is refused.
        aliases: modules that transformers has under another name, as (checkpoint's, transformers'), `*` for a number.
        alone: of a family whose blocks are one part each: which, "attention", "recurrent", "mlp" or "experts", from a
            config with `sizes`.
        factors: buffers that multiply what passes a module, by their own names, so they are of the model's type.
        keep: layers of a block that stay in 16 bits, as the vendor's own quantized checkpoints have it.
        fixed_depth: why no block can be removed, after the model type; "" where blocks can be.
        by_layer: fields of config.json that list something for each block.
        numbered: fields that list numbers of blocks.
        first_blocks: fields that count blocks from the first one.
        last_blocks: fields that number the last block of a kind; -1 is the model's last.
        next_token_blocks: the field that counts blocks behind the last one, which predict further tokens (MTP) and take
            no part in the model's own; they are kept as they are.
        beside: what the names of tensors begin with that predict further tokens, in families that name them apart.
        attention_types: what `layer_types` may say of a block.
        nope: which blocks turn neither queries nor keys by their position, from a config.
        sizes: a config's sizes under the names that Llama has for them, where this family has others.
        bos: whether every text must begin with the BOS token, without which likelihoods are far off.
        qkv_bias, output_bias, mlp_bias, head_bias: which linear layers have a bias: before attention and behind it, the
            MLP's, the output head.
        others: shapes of the tensors that are none of those above, by name, from a config and its sizes; those of a
            block have {} for its number; None takes one of those above away.
        llama_block: whether a block computes what a Llama's does, which `runtime.decoder.step` then computes faster.
        width: whether its blocks can be made narrower.
        head_dim: what transformers takes where config.json is silent; None is hidden size / heads.
        heads_divide_hidden: whether its config wants a hidden size that the number of heads divides.
        tensor_parallel, pipeline_parallel: whether the torch engine can split its layers, or its blocks, over ranks.
        misread_heads: back ends that take the rows of a fused layer before attention for others where keys have
            several heads.
        no_serve: why `serve` and paged attention cannot run it; "" where they can.
        wrapper: what stands around the text model, which all else is about, where the checkpoint holds more than that.
    """

    model_type: str
    attention: Attention | LatentAttention | NoAttention = Attention()
    mlp: Mlp | None = Mlp()
    experts: Experts | None = None
    recurrent: Recurrent | None = None
    norm: Norm = "w"
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    last_norm: str = "model.norm"
    head: str = "lm_head"
    norms: tuple[str, ...] | Callable[[Config], tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm")
    depth: str = "num_hidden_layers"
    logits: Callable[[Config], Logits] = field(default=lambda config: Logits())
    limits: tuple[Limit, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    alone: Callable[[Config], Sequence[str]] | None = None
    factors: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    fixed_depth: str = ""
    by_layer: tuple[str, ...] = ("layer_types",)
    numbered: tuple[str, ...] = ()
    first_blocks: tuple[str, ...] = ()
    last_blocks: tuple[str, ...] = ()
    next_token_blocks: str = ""
    beside: tuple[str, ...] = ()
    attention_types: tuple[str, ...] = ("full_attention", "sliding_attention")
    nope: Callable[[Config], Sequence[int]] = field(default=lambda config: ())
    sizes: Callable[[Config], Config] = field(default=lambda config: {})
    bos: bool = False
    head_dim: int | None = None
    qkv_bias: Said = ("attention_bias", False)
    output_bias: Said = False
    mlp_bias: Said = False
    head_bias: Said = False
    others: Callable[[Config, Any], Mapping[str, Shape | None]] = field(default=lambda config, sizes: {})
    llama_block: bool = False
    width: bool = False
    heads_divide_hidden: bool = False
    tensor_parallel: bool = False
    pipeline_parallel: bool = True
    misread_heads: tuple[str, ...] = ()
    no_serve: str = ""
    wrapper: Wrapper | None = None

    @cached_property
    def inputs(self) -> tuple[SharedInput, ...]:
        """All linear layers that a block can have, by the input that they read."""
        parts = (self.attention, self.recurrent, self.mlp, self.experts)
        return tuple(shared for part in parts if part for shared in part.inputs)

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """All linear layers of a block by their names in it."""
        return {layer.name: layer for shared in self.inputs for layer in shared.layers}

    @cached_property
    def _shared(self) -> dict[str, SharedInput]:
        return {layer.name: shared for shared in self.inputs for layer in shared.layers}

    def shared_input(self, within: str) -> SharedInput | None:
        """Returns the layers that read what a linear layer reads, by its name in its block; None for other modules."""
        shared = self._shared.get(_NUMBER.sub("*", within))
        expert = _NUMBER.search(within)
        if shared is None or expert is None:
            return shared
        layers = tuple(layer._replace(name=layer.name.replace("*", expert[0])) for layer in shared.layers)
        return shared._replace(layers=layers)

    @cached_property
    def row_parallel(self) -> tuple[str, ...]:
        """Names in a block of the layers that tensor parallelism splits along their input; the others: their output."""
        return tuple(layer.name for layer in self.layers.values() if layer.inputs != "hidden")

    @cached_property
    def neurons(self) -> tuple[str, ...]:
        """Names in a block of the layers that have the MLP's neurons on one side."""
        return tuple(layer.name for layer in self.layers.values() if {layer.outputs, layer.inputs} & {"ffn", "gate_up"})

    def parts(self, config: Config) -> list[frozenset[str]]:
        """Returns what each block is made of, by a config with `sizes`: "attention", "recurrent", "mlp", "experts"."""
        if self.alone:
            return [frozenset({part}) for part in self.alone(config)]
        recurrent = set(self.recurrent.blocks(config)) if self.recurrent else set()
        experts = set(self.experts.blocks(config)) if self.experts else set()
        found = []
        for block in range(config["num_hidden_layers"]):
            has = {
                "attention": block not in recurrent or self.recurrent.beside_attention,
                "recurrent": block in recurrent,
                "experts": block in experts,
                "mlp": self.mlp is not None and (block not in experts or self.experts.beside_mlp),
            }
            found.append(frozenset(part for part, there in has.items() if there))
        return found

    @property
    def folds(self) -> bool:
        """Whether what multiplies the input of layers behind a norm can be put into the norm's weight, and bias."""
        return self.norm != "none"

    @property
    def norm_offset(self) -> float:
        """What is added to a norm's weight before it multiplies."""
        return 1.0 if self.norm.startswith("1 + w") else 0.0

    def place(self, name: str) -> tuple[int | None, str]:
        """Returns the block of a module or tensor and its name there; None and the whole name of one in no block."""
        prefix = f"{self.blocks}."
        number, _, within = name[len(prefix) :].partition(".") if name.startswith(prefix) else ("", "", "")
        return (int(number), within) if number.isdecimal() and within else (None, name)

    def is_beside(self, name: str, config: Config) -> bool:
        """Whether a tensor takes no part in the text model's next token: one of a block that predicts further ones, or
        of what a wrapper holds beside its text model.

        Args:
            config: the text model's.
        """
        around = self.wrapper and not name.startswith((f"{self.wrapper.within}.", f"{self.head}."))
        if around or name.startswith(self.beside):
            return True
        block, _ = self.place(name)
        return block is not None and self.next_token_blocks != "" and block >= config["num_hidden_layers"]

    def layer(self, name: str) -> Layer | None:
        """Returns what a linear layer of a block is, by its whole name; None for any other module."""
        block, within = self.place(name)
        return None if block is None else self.layers.get(_NUMBER.sub("*", within))

    def expert(self, name: str) -> tuple[str, str] | None:
        """Returns the number of the expert that a tensor or module belongs to, and its name there; else None."""
        block, within = self.place(name)
        if block is None or self.experts is None or not within.startswith(f"{self.experts.prefix}."):
            return None
        number, _, rest = within[len(self.experts.prefix) + 1 :].partition(".")
        return (number, rest) if number.isdecimal() else None

    def is_expert(self, layer: str) -> bool:
        """Whether a linear layer is one of an expert's, to which only some tokens are given."""
        return self.expert(layer) is not None

    def scales_channels(self, layer: str) -> bool:
        """Whether a method may multiply the channels of a layer's input: not those of a mixture's experts, shared ones
        among them, whose fused kernels in TensorRT-LLM and vLLM have no place for such a scale."""
        _, within = self.place(layer)
        return self.experts is None or not within.startswith((f"{self.experts.prefix}.", *self._shared_expert))

    @cached_property
    def _makers(self) -> dict[str, str]:
        """Names in a block: of a layer, and of the one that `layer_before` gives."""
        found, heads, mlp = {}, self.attention, self.mlp
        if isinstance(heads, Attention) and not (heads.qkv or heads.own_scores or heads.clips):
            found[heads.inputs[1].layers[0].name] = heads.inputs[0].layers[2].name
        if mlp and mlp.gate and not mlp.gate_up:
            found[mlp.inputs[1].layers[0].name] = mlp.inputs[0].layers[1].name
        return found

    def layer_before(self, layer: str) -> str | None:
        """Returns the linear layer whose outputs become the inputs of another by nothing but factors and sums over
        tokens, or None: so what its rows are divided by multiplies those inputs' channels. Values become the input of
        attention's output, those of a head the inputs of all query heads that share it; what a gate multiplies becomes
        the input of the layer behind the neurons."""
        block, within = self.place(layer)
        maker = self._makers.get(within)
        return None if block is None or maker is None else f"{self.blocks}.{block}.{maker}"

    @cached_property
    def _shared_expert(self) -> tuple[str, ...]:
        part = self.experts
        return (f"{part.module}.{part.shared}.",) if part and part.shared else ()

    def keeps(self, layer: str) -> bool:
        """Whether a linear layer stays in 16 bits, see `keep`."""
        return self.keep != () and self.layer(layer).name in self.keep

    def stays_plain(self, name: str) -> bool:
        """Whether a matrix in a block is no linear layer that could be rounded: a router, and the like."""
        block, within = self.place(name)
        return block is not None and self.experts is not None and within in self.experts.unrounded

    def is_of_router(self, name: str) -> bool:
        """Whether a tensor is one that a router chooses or weighs by: of its matrices, or a number for each expert."""
        block, within = self.place(name)
        if block is None or self.experts is None:
            return False
        vector = f"{self.experts.module}.{self.experts.vector}" if self.experts.vector else ""
        return within == vector or within.rpartition(".")[0] in self.experts.unrounded

    def is_of_state(self, name: str) -> bool:
        """Whether a tensor of a recurrent mixer is none of its linear layers': decays, time steps, its convolution."""
        block, within = self.place(name)
        if block is None or self.recurrent is None or not within.startswith(f"{self.recurrent.module}."):
            return False
        module = name.rpartition(".")[0]
        return self.layer(module) is None and not self.stays_plain(module)

    def without_blocks(self, config: Config, kept: Sequence[int]) -> dict[str, Any]:
        """Returns the fields of a config that another choice of blocks changes, with their new values.

        Args:
            config: of the whole model; in a wrapper, of its text model.
            kept: the numbers of the blocks that stay, ascending.

        Raises:
            ValueError: the config lists something for each block under a name that the family does not say.
        """
        count = {**config, **self.sizes(config)}[self.depth]
        lists = {name for name, value in config.items() if isinstance(value, (list, tuple)) and len(value) == count}
        if unknown := sorted(lists - {*self.by_layer, *self.numbered} - _NOT_BY_LAYER):
            raise ValueError(f"{unknown[0]} has as many entries as the model has blocks, and may go by block")
        changed: dict[str, Any] = {self.depth: len(kept)}
        changed |= {name: [config[name][block] for block in kept] for name in self.by_layer if name in lists}
        for name in self.numbered:
            if config.get(name) is not None:
                changed[name] = [place for place, block in enumerate(kept) if block in config[name]]
        for name in self.first_blocks:
            if config.get(name) is not None:
                changed[name] = sum(block < config[name] for block in kept)
        for name in self.last_blocks:
            if config.get(name) not in (None, -1):
                changed[name] = sum(block <= config[name] for block in kept) - 1
        return changed

    def refusal(self, config: Config) -> str:
        """Returns why a model with this config, of a wrapper's text model, is none that is described here, or ""."""
        for limit in self.limits:
            value = config.get(limit.field, limit.default)
            if value not in limit.known:
                return f"{limit.field} is {value}, {limit.reason}"
        for kind in config.get("layer_types") or ():
            if kind not in self.attention_types:
                return f"layer_types names '{kind}', and {' and '.join(self.attention_types)} are what is known"
        return ""


#: Lists of a config that are none of its blocks', whatever their length.
_NOT_BY_LAYER = frozenset(
    {"architectures", "eos_token_id", "keys_to_ignore_at_inference", "mtp_layers_block_type", "time_step_limit"}
)
