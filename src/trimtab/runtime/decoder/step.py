"""A decoding step with as few kernels as it has work: the products, and one or two kernels between any two of them.

transformers' forward pass launches some forty kernels a block, most of which move a few kilobytes; on a fast GPU they
take longer than reading the weights does. This computes the same for the Llama family (Llama, Mistral, Qwen2, Qwen3 and
what is built like them): blocks of RMSNorm, attention with rotary embeddings, RMSNorm and an MLP of silu(gate) * up.
Whether a model is one its family says, and its modules and a comparison of its logits confirm it; any other keeps its
own forward pass.

It is the same step in the engine that is measured and in the one that serves: both hold keys and values in blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab.base import progress
from trimtab.families import Logits
from trimtab.runtime.checkpoint.skeleton import family_of
from trimtab.runtime.kernels.replacements import FusedRMSNorm
from trimtab.runtime.kernels.spans import Spans
from trimtab.runtime.kv_cache import paged_attention
from trimtab.runtime.kv_cache.paged import PagedKVCache
from trimtab.runtime.kv_cache.paged_attention import Pass
from trimtab.runtime.linear import elementwise, fused, small_batch
from trimtab.runtime.linear.choice import PackedLinear
from trimtab.runtime.linear.elementwise import Angles, Kernels, Sizes

Multiply = Callable[[torch.Tensor], torch.Tensor]

#: Rotary embeddings whose angles depend on nothing but the position.
_ROTARY = ("default", "linear", "llama3", "yarn")
#: Tokens of the prompts that a step is tried on, and of a block of their cache.
_TRIAL, _BLOCK_SIZE = 7, 16


@dataclass(frozen=True)
class _Block:
    """What a step needs of one block."""

    layer: int
    before: FusedRMSNorm
    qkv: Multiply
    query_norm: nn.Module | None
    key_norm: nn.Module | None
    scaling: float
    out: Multiply
    between: FusedRMSNorm
    gate_up: Multiply
    down: Multiply


class DecodingStep:
    """Computes the logits of one token a sequence, or of packed tokens where a pass tells the kernel their spans.

    Args:
        model: one that `refusal` says nothing against; its modules and weights are used as they are.
        positions: that a token may have, from 0.
        kernels: the functions between the products.
        products: in the place of some of the layers.
        by_spans: whether a pass tells the attention kernel its spans; else its blocks are gathered.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        positions: int,
        kernels: Kernels | None = None,
        products: dict[nn.Module, Multiply] | None = None,
        by_spans: bool = False,
    ):
        body, self._family = model.base_model, family_of(model)
        self.kernels, self._products, self.by_spans = kernels or Kernels(), products or {}, by_spans
        self.sizes = sizes(model)
        self._embedding, self._norm = model.get_input_embeddings(), model.get_submodule(self._family.last_norm)
        self._head = self._product(model.get_output_embeddings())
        self._blocks = [self._block(block) for block in model.get_submodule(self._family.blocks)]
        like = torch.empty(0, dtype=self._norm.weight.dtype, device=model.device)
        cos_1PD, sin_1PD = body.rotary_emb(like, position_ids=torch.arange(positions, device=model.device)[None])
        self._angles = Angles(cos_1PD[0].contiguous(), sin_1PD[0].contiguous())

    def __call__(
        self, tokens_1S: torch.Tensor, positions_1S: torch.Tensor, where: Pass, last: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the logits [S, V] of tokens int64 [1, S] at their positions, and stores their keys and values.

        Args:
            last: int64, the only tokens whose logits are asked for; None is all.
        """
        kernels, positions_S, residual = self.kernels, positions_1S[0], None
        x = self._embedding(tokens_1S[0])
        for block in self._blocks:
            x, residual = kernels.add_norm(x, residual, block.before.weight, block.before.epsilon)
            qkv = self._normed(block, block.qkv(x))
            query_SHD = kernels.rotate_and_store(qkv, self._angles, positions_S, where, block.layer)
            if where.spans:
                seen_SHD = where.cache.attend(block.layer, query_SHD, where.spans, block.scaling)
            else:
                seen_SHD = paged_attention.decode_attention(query_SHD, where, block.layer, block.scaling, None)
            x = block.out(seen_SHD.flatten(1))
            x, residual = kernels.add_norm(x, residual, block.between.weight, block.between.epsilon)
            x = block.down(kernels.silu_mul(block.gate_up(x)))
        if last is not None:
            x, residual = x[last], residual[last]
        x, _ = kernels.add_norm(x, residual, self._norm.weight, self._norm.epsilon)
        return self._head(x)

    def _block(self, block: nn.Module) -> _Block:
        a, m = self._family.attention, self._family.mlp
        attention, mlp = getattr(block, a.module), getattr(block, m.module)
        query_norm, key_norm = (getattr(attention, name) for name in a.head_norms) if a.head_norms else (None, None)
        return _Block(
            layer=attention.layer_idx,
            before=getattr(block, a.norm),
            qkv=self._together(attention, a.query, a.key, a.value),
            query_norm=query_norm,
            key_norm=key_norm,
            scaling=attention.scaling,
            out=self._product(getattr(attention, a.output)),
            between=getattr(block, m.norm),
            gate_up=self._together(mlp, m.gate, m.up),
            down=self._product(getattr(mlp, m.down)),
        )

    def _together(self, module: nn.Module, *names: str) -> Multiply:
        """Returns the product of layers that read one input: their outputs side by side."""
        layers = [getattr(module, name) for name in names]
        if isinstance(layers[0], fused.FusedPart):
            return self._product(layers[0].product.layer)
        products = [self._product(layer) for layer in layers]
        return lambda x: torch.cat([product(x) for product in products], dim=-1)

    def _product(self, layer: nn.Module) -> Multiply:
        return self._products.get(layer, layer)

    def _normed(self, block: _Block, qkv: torch.Tensor) -> torch.Tensor:
        """Norms of each head of queries and keys, where a model has them."""
        if block.query_norm is None:
            return qkv
        sizes = self.sizes
        heads_SHD = qkv.unflatten(-1, (-1, sizes.head_dim))
        query, key, value = heads_SHD.split([sizes.heads, sizes.kv_heads, sizes.kv_heads], dim=1)
        return torch.cat([block.query_norm(query), block.key_norm(key), value], dim=1).flatten(1)


def sizes(model: PreTrainedModel) -> Sizes:
    """Returns the sizes of a model, or of this process's part of one."""
    family = family_of(model)
    block = model.get_submodule(family.blocks)[0]
    attention, mlp = getattr(block, family.attention.module), getattr(block, family.mlp.module)
    query, keys = (getattr(attention, name) for name in (family.attention.query, family.attention.key))
    heads, kv_heads = (layer.out_features // attention.head_dim for layer in (query, keys))
    neurons = getattr(mlp, family.mlp.up).out_features
    return Sizes(heads, kv_heads, attention.head_dim, query.in_features, neurons)


def refusal(model: PreTrainedModel, positions: int) -> str:
    """Returns what a model has that a step does not know, or lacks; "" where it knows all, up to so many positions."""
    body, config = model.base_model, model.config
    family = family_of(model)
    if not family.llama_block:
        return "has blocks of another family than Llama's"
    if family.logits(config.to_dict()) != Logits():
        return "changes its logits behind the output head"
    if blocks_without := family.nope(config.to_dict()):
        return f"block {blocks_without[0]} has no rotary embedding"
    named = (family.embedding, family.blocks, family.last_norm)
    if not _holding(body) <= {*(name.rpartition(".")[2] for name in named), "rotary_emb"}:
        return "has more than an embedding, blocks and a norm"
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type", "default") not in _ROTARY:
        return f"has rotary embeddings of type {rotary.get('rope_type')}"
    a, m = family.attention, family.mlp
    for number, block in enumerate(model.get_submodule(family.blocks)):
        if _holding(block) != {a.module, a.norm, m.module, m.norm} or block._forward_hooks:
            return f"block {number} is built another way"
        attention, mlp = getattr(block, a.module), getattr(block, m.module)
        layers = {a.query, a.key, a.value, a.output, *a.head_norms}
        if _holding(attention) != layers or _holding(mlp) != {m.gate, m.up, m.down}:
            return f"block {number} has other layers"
        norms = (getattr(block, a.norm), getattr(block, m.norm), model.get_submodule(family.last_norm))
        if not all(isinstance(norm, FusedRMSNorm) for norm in norms):
            return f"block {number} has norms of another kind"
        if any(getattr(attention, norm).weight.shape != (attention.head_dim,) for norm in a.head_norms):
            return f"block {number} has norms over all heads"
        window = getattr(attention if hasattr(attention, "sliding_window") else config, "sliding_window", None)
        if window and window < positions:
            return f"block {number} looks at {window} tokens alone"
        activation = type(getattr(mlp, "act_fn", None)).__name__
        if activation not in ("SiLU", "SiLUActivation"):
            return f"block {number} has the activation {activation}"
    return ""


def _holding(module: nn.Module) -> set[str]:
    """Names of a module's parts that hold numbers."""
    return {n for n, m in module.named_children() if [*m.parameters(), *m.buffers()]}


@torch.inference_mode()
def build(model: PreTrainedModel, positions: int) -> DecodingStep | None:
    """Returns the step of a model, on a GPU with the fastest kernels found, or None: it has none, and reports why."""
    reason = refusal(model, positions)
    if not reason:
        kernels, products, by_spans = elementwise.choose(sizes(model), model.device), {}, False
        if model.device.type == "cuda":
            progress.report("engine", "measuring products of few rows")
            products = small_batch.choose(layers(model))
            if why := paged_attention.why_no_kernel(model):
                progress.report("engine", f"attention runs without a kernel of its own: {why}")
            by_spans = not why
        step = DecodingStep(model, positions, kernels, products, by_spans)
        reason = disagreement(model, step, positions)
    if reason:
        progress.report("engine", f"decodes by transformers' forward pass: {type(model).__name__} {reason}")
        return None
    return step


def layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the layers that a step multiplies with, and the head."""
    found = [model.get_output_embeddings()]
    for module in model.base_model.modules():
        if isinstance(module, fused.FusedPart):
            found.append(module.product.layer)
        elif isinstance(module, (nn.Linear, PackedLinear)):
            found.append(module)
    return list(dict.fromkeys(found))


@torch.inference_mode()
def disagreement(model: PreTrainedModel, step: DecodingStep, positions: int) -> str:
    """Returns "" where a step gives the logits of the model's own forward pass, for one sequence and for three.

    How near they must be, the model tells: its logits where what each block reads is off by a unit of bfloat16's last
    place. Numbers that FP8 or INT8 rounds to a neighbour then add up over the blocks: 0.03 of the logits' norm in BF16
    and 0.24 in FP8 for 16 random blocks 2,048 wide, of which the embeddings alone were moved, and two thirds of that
    between the two ways. A model that is built another way is off by about as much as the logits are large.
    """
    length = min(_TRIAL, positions - 1)
    vocabulary = model.config.vocab_size
    for batch in (1, 3):
        tokens = (torch.arange(batch * (length + 1), device=model.device) * 7919 % vocabulary).view(batch, -1)
        expected = _last_logits(model, tokens)
        with shaken(model):
            noise = (_last_logits(model, tokens) - expected).norm()
        decoding = Decoding(model, batch, length + 1, step.by_spans)
        decoding.read(tokens[:, :-1])
        found = step(tokens[:, -1][None], decoding.positions[None], decoding.where()).float()
        apart, moved = ((x / expected.norm()).item() for x in ((found - expected).norm(), noise))
        if not apart <= min(max(2 * moved, 0.02), 0.5):
            return f"gives other logits than a step does: {apart:.3f} of their norm off, rounding moves {moved:.3f}"
    return ""


def _last_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False, logits_to_keep=1).logits[:, -1].float()


@contextlib.contextmanager
def shaken(model: PreTrainedModel) -> Iterator[None]:
    """Moves what each block reads by a unit of bfloat16's last place, up or down."""

    def shake(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *others = given
        signs = (torch.arange(x.numel(), device=x.device) * 7919 % 13 % 2 * 2 - 1).view_as(x)
        return (x * (1 + 2**-8 * signs)).to(x.dtype), *others

    with contextlib.ExitStack() as hooks:
        for block in model.get_submodule(family_of(model).blocks):
            hooks.callback(block.register_forward_pre_hook(shake).remove)
        yield


class Decoding:
    """Sequences of one length that are decoded together: their cache, and where their next token stands in it."""

    def __init__(self, model: PreTrainedModel, batch_size: int, length: int, by_spans: bool = False):
        blocks = -(-length // _BLOCK_SIZE)
        self.model = model
        self.cache = PagedKVCache.for_model(model, batch_size * blocks, _BLOCK_SIZE)
        self._tables = torch.arange(batch_size * blocks, device=model.device).view(batch_size, blocks)
        #: Position, slot and length with the next token of each sequence; all grow by one a step.
        self._counts = torch.zeros(3, batch_size, dtype=torch.int64, device=model.device)
        self._spans: Spans | None = None
        if by_spans:
            number = torch.arange(batch_size, dtype=torch.int32, device=model.device)
            spans_B4 = torch.stack([number, torch.ones_like(number), torch.zeros_like(number), number], dim=1)
            self._spans = Spans(spans_B4, self._tables.int(), 1)

    @property
    def positions(self) -> torch.Tensor:
        """Where the next tokens stand, int64 [S]."""
        return self._counts[0]

    def where(self) -> Pass:
        """The pass of the next tokens."""
        return Pass(self.cache, self._counts[1], self._tables, self._counts[2], [], self._spans)

    def advance(self) -> None:
        """Makes room for the next tokens, without waiting for the device."""
        self._counts.add_(1)
        if self._spans:
            self._spans.spans_B4[:, 2].add_(1)

    def read(self, prompt: torch.Tensor) -> torch.Tensor:
        """Begins anew with prompts, int64 [S, length]; returns the logits of their last tokens, [S, 1, V]."""
        length = prompt.shape[1]
        output: Any = self.model(prompt, use_cache=True, logits_to_keep=1)
        slots = (self._tables[:, :1] * _BLOCK_SIZE + torch.arange(length, device=prompt.device)).flatten()
        for number, layer in enumerate(output.past_key_values.layers):
            pair = (x.transpose(1, 2).flatten(0, 1) for x in (layer.keys, layer.values))
            self.cache.write(number, slots, *pair)
        first = self._tables[:, 0] * _BLOCK_SIZE
        counts = [torch.full_like(first, length), first + length, torch.full_like(first, length + 1)]
        self._counts.copy_(torch.stack(counts))
        if self._spans:
            self._spans.spans_B4[:, 2].fill_(length)
        return output.logits
