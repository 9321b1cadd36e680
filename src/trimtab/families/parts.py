"""The parts of a block: attention, an MLP, experts; each says which linear layers it has.

A name of a layer may hold `*`, which stands for the number of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

#: What a layer's features are: hidden channels, query heads, heads of keys (or of values), all three in one, neurons of
#: the MLP, or gate and up in one; neurons of one expert, or of the experts that every token passes; compressed queries,
#: compressed keys and values, these with the keys' rotary part, the keys and values of all heads that come out of them;
#: the values of all query heads, where they are shorter than queries; query heads with a gate for each number; what
#: goes into a recurrent mixer, what comes out, and what it chooses by.
Side = Literal[
    "hidden", "attention", "kv", "qkv", "ffn", "gate_up", "expert", "shared", "query_latent", "kv_latent",
    "kv_latent_rotary", "kv_heads", "values", "attention_gate", "mixer_in", "mixer", "mixer_choice",
]  # fmt: skip
#: What a norm multiplies by: its weight, or one plus its weight; it may add a bias; or nothing.
Norm = Literal["w", "1 + w", "w, b", "1 + w, b", "none"]

#: Fields that count experts: transformers 5 writes another name for some families than their checkpoints have.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

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

    `norm` is the module of the block whose output these layers read, and no others; None where there is no such. Not
    every block has all of them.
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
    has no place to round or page what it keeps. `gated`: `query` makes a gate of what comes out too, as wide as the
    queries. `clips`: a config may limit what queries, keys and values hold.
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
    gated: bool = False
    clips: bool = False

    @property
    def inputs(self) -> tuple[SharedInput, ...]:
        """What the layers before attention read, and what the layer behind it reads."""
        if self.qkv:
            before = (Layer(within(self.module, self.qkv), "qkv", "hidden"),)
        else:
            queries = "attention_gate" if self.gated else "attention"
            sides = ((self.query, queries), (self.key, "kv"), (self.value, "kv"))
            before = tuple(Layer(within(self.module, name), side, "hidden") for name, side in sides)
        behind = Layer(within(self.module, self.output), "hidden", "attention")
        return SharedInput(before, self.norm), SharedInput((behind,))

    @property
    def norms_of_heads(self) -> tuple[str, ...]:
        """Names in the block of `head_norms`."""
        return tuple(within(self.module, norm) for norm in self.head_norms)

    @property
    def scaled(self) -> tuple[str, str] | None:
        """The layers in the block that hold the scales of keys and of values; None where a cache cannot be rounded."""
        if self.qkv or self.own_scores:
            return None
        return within(self.module, self.key), within(self.module, self.value)

    @property
    def unscaled(self) -> str:
        """Why a KV cache of it cannot be rounded, after the model's name; "" where it can."""
        if self.qkv:
            return "makes its keys and values in one layer with its queries, for which no scales are written"
        if self.own_scores:
            return "computes attention in modules of its own, which read no rounded keys and values"
        return ""

    def head_numbers(self, config: Config, head_dim: int) -> int:
        """Returns how many numbers of a token a head of keys and values keeps: a key and a value."""
        return 2 * head_dim

    def latent_numbers(self, config: Config) -> int:
        """Returns how many numbers of a token a block keeps that all heads share; 0 where each head has its own."""
        return 0


@dataclass(frozen=True)
class LatentAttention:
    """Attention whose keys and values are kept compressed (MLA; DeepSeek-AI 2024, "DeepSeek-V2").

    Queries come out of `query`, or out of `compressed_query` and `query_heads` behind a norm. `compressed` gives the
    compressed keys and values, and the rotary part of the keys, which all heads share; `heads` makes keys and values
    of them. Engines multiply `heads` into their neighbours and read its weight as it is, so it stays in 16 bits.
    """

    module: str = "self_attn"
    norm: str | None = "input_layernorm"
    query: str = "q_proj"
    compressed_query: str = "q_a_proj"
    query_heads: str = "q_b_proj"
    compressed: str = "kv_a_proj_with_mqa"
    heads: str = "kv_b_proj"
    output: str = "o_proj"
    query_norm: str = "q_a_layernorm"
    latent_norm: str = "kv_a_layernorm"
    head_norms: tuple[str, ...] = ()
    norms_of_heads: tuple[str, ...] = ()
    scaled = None
    unscaled = "keeps its keys and values compressed, for which no scales are written"
    qkv = None

    @property
    def inputs(self) -> tuple[SharedInput, ...]:
        """What the layers before attention read, what those behind the compression read, and the one behind it all."""
        before = ((self.query, "attention"), (self.compressed_query, "query_latent"),
                  (self.compressed, "kv_latent_rotary"))  # fmt: skip
        single = ((self.query_heads, "attention", "query_latent"), (self.heads, "kv_heads", "kv_latent"),
                  (self.output, "hidden", "values"))  # fmt: skip
        layers = tuple(Layer(within(self.module, name), side, "hidden") for name, side in before)
        others = (SharedInput((Layer(within(self.module, name), *sides),)) for name, *sides in single)
        return SharedInput(layers, self.norm), *others

    def head_numbers(self, config: Config, head_dim: int) -> int:
        """Returns how many numbers of a token a head keeps where an engine stores keys and values as they are used."""
        return config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]

    def latent_numbers(self, config: Config) -> int:
        """Returns how many numbers of a token a block keeps: compressed keys and values, and the rotary part."""
        return config["kv_lora_rank"] + config["qk_rope_head_dim"]


@dataclass(frozen=True)
class NoAttention:
    """What stands for attention in a family without any: no layers, and nothing kept of a token."""

    module: str = ""
    norm = scaled = qkv = None
    head_norms = norms_of_heads = inputs = ()
    unscaled = "keeps no keys and values, but a recurrent state, which stays as it is"

    def head_numbers(self, config: Config, head_dim: int) -> int:
        """Returns 0: nothing is kept of a token."""
        return 0

    def latent_numbers(self, config: Config) -> int:
        """Returns 0: nothing is kept of a token."""
        return 0


@dataclass(frozen=True)
class Mlp:
    """Neurons between two layers; `gate`, where there is one, multiplies what `up` gives.

    `norm` is as in `SharedInput`. `gate_up` is the layer that is gate and up in one, where there is one; then neither
    `gate` nor `up` is there. `module` is "" where the layers stand in the block itself. `side` is what its neurons are,
    and `size` the field of config.json that counts them.
    """

    module: str = "mlp"
    norm: str | None = "post_attention_layernorm"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str | None = None
    side: Side = "ffn"
    size: str = "intermediate_size"

    @property
    def inputs(self) -> tuple[SharedInput, SharedInput]:
        """What the layers before the neurons read, and what the layer behind them reads."""
        if self.gate_up:
            before = (Layer(within(self.module, self.gate_up), "gate_up", "hidden"),)
        else:
            names = (self.gate, self.up) if self.gate else (self.up,)
            before = tuple(Layer(within(self.module, name), self.side, "hidden") for name in names)
        behind = Layer(within(self.module, self.down), "hidden", self.side)
        return SharedInput(before, self.norm), SharedInput((behind,))


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: a router gives each token to a few of many small MLPs; some have one that all tokens pass.

    No norm before it can be folded into: what it makes is read by the router too, which stays in 16 bits.

    Attributes:
        module: of the block.
        experts: the list of experts in that module, in the checkpoint: one module each, by number.
        gate, up, down: layers of an expert, as in `Mlp`.
        shared: the module in `module` of what every token passes, or None; its layers are named alike.
        plain: other matrices of `module`, which choose or weigh and are never rounded: with a row for each expert, or
            one row for the shared ones.
        vector: what `module` has besides with a number for each expert, "" for nothing.
        vector_rows: 0 where it is stored as these numbers alone, else the rows that it has, in each of which they are.
        biased: whether the layers of an expert have biases.
        blocks: which blocks have experts, from a config.
        chosen, size: fields of config.json: experts of a token, neurons of an expert.
        shared_size: the field of neurons of the shared ones, or the field that counts them in units of `size`.
        beside_mlp: whether a block with experts has the family's MLP too, whose neurons `shared_size` counts.
    """

    module: str = "mlp"
    experts: str = "experts"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str | None = None
    plain: tuple[str, ...] = ("gate",)
    vector: str = ""
    vector_rows: int = 0
    biased: bool = False
    blocks: Callable[[Config], Sequence[int]] = field(default=lambda config: range(config["num_hidden_layers"]))
    chosen: str = "num_experts_per_tok"
    size: str = "moe_intermediate_size"
    shared_size: str | None = None
    beside_mlp: bool = False

    @property
    def inputs(self) -> tuple[SharedInput, ...]:
        """What the layers of an expert read, and those of the shared one."""
        one = Mlp(self.prefix + ".*", None, self.gate, self.up, self.down, side="expert")
        if self.shared is None:
            return one.inputs
        shared = Mlp(within(self.module, self.shared), None, self.gate, self.up, self.down, side="shared")
        return *one.inputs, *shared.inputs

    @property
    def prefix(self) -> str:
        """The list of experts, by its name in the block."""
        return within(self.module, self.experts)

    @property
    def unrounded(self) -> tuple[str, ...]:
        """The matrices that are never rounded, by their names in the block."""
        return tuple(within(self.module, name) for name in self.plain)

    @staticmethod
    def count(config: Config) -> tuple[str, Any]:
        """Returns the field of config.json that says how many experts a block has, and what it says."""
        return next(((name, config[name]) for name in _COUNTS if config.get(name) is not None), (_COUNTS[0], None))

    def shared_neurons(self, config: Config) -> int:
        """Returns the neurons of the experts that every token passes, 0 where there are none."""
        shared = config.get(self.shared_size) or 0 if self.shared_size else 0
        return shared * (1 if not self.shared_size or "size" in self.shared_size else config[self.size])

    def neurons_of_a_token(self, config: Config) -> int:
        """Returns how many neurons a token passes: those of the experts that it is given to, and the shared ones."""
        return config[self.chosen] * config[self.size] + self.shared_neurons(config)


def within(module: str, name: str) -> str:
    """Returns the name in a block of what has this name in one of its modules."""
    return f"{module}.{name}" if module else name
