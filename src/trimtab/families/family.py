"""What a family of decoders is: where its layers stand, which of them read one input, and what may be asked of it.

A block is attention and an MLP, each described by a class of its own that says which linear layers it has; whatever
else has to know the names of layers asks `Family`. A family of another build (experts, recurrent layers, compressed
keys and values) brings a class that answers the same questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

#: What a layer's features are: hidden channels, query heads, heads of keys (or of values), all three in one, neurons of
#: the MLP, or gate and up in one.
Side = Literal["hidden", "attention", "kv", "qkv", "ffn", "gate_up"]
#: What a norm multiplies by: its weight, or one plus its weight; it may add a bias; or nothing.
Norm = Literal["w", "1 + w", "w, b", "1 + w, b", "none"]
#: What a block may look at, as `layer_types` of a config.json says it.
_ATTENTION_TYPES = ("full_attention", "sliding_attention")

Config = Mapping[str, Any]
#: Whether a part is there: always, never, or as a field of config.json says, else as transformers has it.
Said = bool | tuple[str, bool]
Shape = tuple[int, ...]


class Layer(NamedTuple):
    """A linear layer: its name in its block, and what its output and its input features are."""

    name: str
    outputs: Side
    inputs: Side


class SharedInput(NamedTuple):
    """Linear layers of a block that read one input, in the order in which engines stack their outputs.

    `norm` is the module of the block whose output these layers read, and no others; None where there is no such.
    """

    layers: tuple[Layer, ...]
    norm: str | None = None


@dataclass(frozen=True)
class Attention:
    """Attention with heads of keys and values that several query heads may share (GQA).

    `norm` is as in `SharedInput`. `qkv` is the layer that is query, key and value in one, where there is one; then
    `query`, `key` and `value` are not there. `head_norms` are the norms of queries and of keys, `has_head_norms` tells
    whether they are there, and `head_norms_span` what they have weights for: one head, whichever it is; each head by
    itself, [heads, head_dim]; all heads, in one norm. `own_scores`: the module computes attention itself, so the engine
    has no place to round or page what it keeps.
    """

    module: str = "self_attn"
    norm: str | None = "input_layernorm"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    qkv: str | None = None
    head_norms: tuple[str, ...] = ()
    has_head_norms: Said = True
    head_norms_span: Literal["head", "each head", "heads"] = "head"
    own_scores: bool = False

    @property
    def inputs(self) -> tuple[SharedInput, SharedInput]:
        """What the layers before attention read, and what the layer behind it reads."""
        if self.qkv:
            before = (Layer(_within(self.module, self.qkv), "qkv", "hidden"),)
        else:
            sides = ((self.query, "attention"), (self.key, "kv"), (self.value, "kv"))
            before = tuple(Layer(_within(self.module, name), side, "hidden") for name, side in sides)
        behind = Layer(_within(self.module, self.output), "hidden", "attention")
        return SharedInput(before, self.norm), SharedInput((behind,))

    @property
    def norms_of_heads(self) -> tuple[str, ...]:
        """Names in the block of `head_norms`."""
        return tuple(_within(self.module, norm) for norm in self.head_norms)

    @property
    def scaled(self) -> tuple[str, str] | None:
        """The layers in the block that hold the scales of keys and of values; None where a cache cannot be rounded."""
        if self.qkv or self.own_scores:
            return None
        return _within(self.module, self.key), _within(self.module, self.value)

    def cached_numbers(self, kv_heads: int, head_dim: int) -> int:
        """Returns how many numbers of a token a block keeps: its keys and its values."""
        return 2 * kv_heads * head_dim


@dataclass(frozen=True)
class Mlp:
    """Neurons between two layers; `gate`, where there is one, multiplies what `up` gives.

    `norm` is as in `SharedInput`. `gate_up` is the layer that is gate and up in one, where there is one; then neither
    `gate` nor `up` is there. `module` is "" where the layers stand in the block itself.
    """

    module: str = "mlp"
    norm: str | None = "post_attention_layernorm"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str | None = None

    @property
    def inputs(self) -> tuple[SharedInput, SharedInput]:
        """What the layers before the neurons read, and what the layer behind them reads."""
        if self.gate_up:
            before = (Layer(_within(self.module, self.gate_up), "gate_up", "hidden"),)
        else:
            names = (self.gate, self.up) if self.gate else (self.up,)
            before = tuple(Layer(_within(self.module, name), "ffn", "hidden") for name in names)
        return SharedInput(before, self.norm), SharedInput((Layer(_within(self.module, self.down), "hidden", "ffn"),))


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
    """One kind of decoder, by the names of its checkpoint, which are those of transformers' modules.

    Attributes:
        model_type: as config.json says it.
        attention, mlp: the two parts of a block.
        norm: what the norms of a block multiply by.
        blocks: the list of blocks.
        embedding, last_norm, head: the modules before and behind them; the head's weights may be the embedding's.
        norms: the norms of a block, which have a weight for each hidden channel.
        depth: the field of config.json that counts the blocks.
        logits: what becomes of the head's products, from a config.
        limits: settings of config.json with which a model is refused.
        by_layer: fields of config.json that list something for each block.
        first_blocks: fields that count blocks from the first one.
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
        no_serve: why `serve` and paged attention cannot run it; "" where they can.
    """

    model_type: str
    attention: Attention = Attention()
    mlp: Mlp = Mlp()
    norm: Norm = "w"
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    last_norm: str = "model.norm"
    head: str = "lm_head"
    norms: tuple[str, ...] | Callable[[Config], tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm")
    depth: str = "num_hidden_layers"
    logits: Callable[[Config], Logits] = field(default=lambda config: Logits())
    limits: tuple[Limit, ...] = ()
    by_layer: tuple[str, ...] = ("layer_types",)
    first_blocks: tuple[str, ...] = ()
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
    no_serve: str = ""

    @cached_property
    def inputs(self) -> tuple[SharedInput, ...]:
        """All linear layers of a block, by the input that they read."""
        return (*self.attention.inputs, *self.mlp.inputs)

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """All linear layers of a block by their names in it."""
        return {layer.name: layer for shared in self.inputs for layer in shared.layers}

    @cached_property
    def shared(self) -> dict[str, SharedInput]:
        """What each linear layer of a block reads, by the layer's name in it."""
        return {layer.name: shared for shared in self.inputs for layer in shared.layers}

    @cached_property
    def row_parallel(self) -> tuple[str, ...]:
        """Names in a block of the layers that tensor parallelism splits along their input; the others: their output."""
        return tuple(layer.name for layer in self.layers.values() if layer.inputs != "hidden")

    @cached_property
    def neurons(self) -> tuple[str, ...]:
        """Names in a block of the layers that have the MLP's neurons on one side."""
        return tuple(layer.name for layer in self.layers.values() if {layer.outputs, layer.inputs} & {"ffn", "gate_up"})

    @property
    def folds(self) -> bool:
        """Whether what multiplies the input of layers behind a norm can be put into the norm's weight."""
        return self.norm == "w"

    def place(self, name: str) -> tuple[int | None, str]:
        """Returns the block of a module or tensor and its name there; None and the whole name of one in no block."""
        prefix = f"{self.blocks}."
        number, _, within = name[len(prefix) :].partition(".") if name.startswith(prefix) else ("", "", "")
        return (int(number), within) if number.isdecimal() and within else (None, name)

    def layer(self, name: str) -> Layer | None:
        """Returns what a linear layer of a block is, by its whole name; None for any other module."""
        block, within = self.place(name)
        return None if block is None else self.layers.get(within)

    def without_blocks(self, config: Config, kept: Sequence[int]) -> dict[str, Any]:
        """Returns the fields of a config that another choice of blocks changes, with their new values.

        Args:
            config: of the whole model.
            kept: the numbers of the blocks that stay, ascending.

        Raises:
            ValueError: the config lists something for each block under a name that the family does not say.
        """
        count = config[self.depth]
        lists = {name for name, value in config.items() if isinstance(value, (list, tuple)) and len(value) == count}
        if unknown := sorted(lists - {*self.by_layer} - _NOT_BY_LAYER):
            raise ValueError(f"{unknown[0]} has as many entries as the model has blocks, and may go by block")
        changed: dict[str, Any] = {self.depth: len(kept)}
        changed |= {name: [config[name][block] for block in kept] for name in self.by_layer if name in lists}
        for name in self.first_blocks:
            if config.get(name) is not None:
                changed[name] = sum(block < config[name] for block in kept)
        return changed

    def refusal(self, config: Config) -> str:
        """Returns why a model with this config is none that the family describes, or ""."""
        for limit in self.limits:
            value = config.get(limit.field, limit.default)
            if value not in limit.known:
                return f"{limit.field} is {value}, {limit.reason}"
        for kind in config.get("layer_types") or ():
            if kind not in _ATTENTION_TYPES:
                return f"layer_types names '{kind}', and {' and '.join(_ATTENTION_TYPES)} are what is known"
        return ""


#: Lists of a config that are none of its blocks', whatever their length.
_NOT_BY_LAYER = frozenset({"architectures", "eos_token_id", "keys_to_ignore_at_inference"})


def _within(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
