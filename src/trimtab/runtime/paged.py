"""A paged KV cache for transformers' models, and the attention that reads it; FP8 and INT8 are held in 8 bits.

transformers has a paged cache of its own (`generate_batch`), and it runs with packed linears. It holds 16 bits alone,
so an export's FP8 or INT8 KV cache would be another in service than in judgement; and without FlashAttention its SDPA
path lays all sequences side by side and lets each look at all, work that grows with the square of the batch.

Axes in names: T packed tokens of a pass, S sequences that decode, L tokens of the longest, W blocks of a table,
H query heads, K heads of keys and values, D numbers of a head. A pass has S single tokens first, then prompts' chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from trimtab import families
from trimtab.catalog.kv_caches import BY_ALGORITHM
from trimtab.errors import Failure
from trimtab.runtime import formats, kv_cache

_NAME = "trimtab_paged"
#: Formats that are stored in 8 bits: how codes are made, and the type that they are read as. What is rounded and
#: multiplied by its scale again is, bit for bit, `kv_cache.rounded`.
_TYPES = {"e4m3": (formats.to_fp8, torch.float8_e4m3fn), "int8": (formats.to_int8, torch.int8)}
_CODES = {name: _TYPES[row.numbers] for name, row in BY_ALGORITHM.items() if row.numbers in _TYPES and not row.block}


class PagedKVCache:
    """Keys and values of every layer in blocks, [blocks + 1, block_size, K, D] each; the last block is nobody's.

    What padding computes is written into that block. NVFP4 is rounded and held in 16 bits: PyTorch has no kernel
    that reads it, and two codes a byte would be unpacked at every step.

    Args:
        shapes: (K, D) of each layer.
        algorithm: ModelOpt's name of the format, None for 16 bits.
        scales: of keys and values, by layer.
    """

    def __init__(
        self,
        shapes: dict[int, tuple[int, int]],
        blocks: int,
        block_size: int,
        device: torch.device,
        algorithm: str | None = None,
        scales: dict[int, tuple[float, float]] | None = None,
    ):
        self.block_size, self.algorithm = block_size, algorithm
        self._scales = scales or dict.fromkeys(shapes, (1.0, 1.0))
        stored = torch.uint8 if algorithm in _CODES else torch.bfloat16
        self._pairs = {
            layer: torch.zeros((2, blocks + 1, block_size, *shape), dtype=stored, device=device)
            for layer, shape in shapes.items()
        }

    @classmethod
    def for_model(cls, model: PreTrainedModel, blocks: int, block_size: int) -> PagedKVCache:
        """Returns the cache of a model, in the format that its export asks for.

        Raises:
            Failure: `unsupported`, not every block has attention.
        """
        modules = attention_layers(model)
        shapes = {m.layer_idx: (key_features(model, m) // m.head_dim, m.head_dim) for m in modules}
        scales = {m.layer_idx: getattr(m, "kv_cache", (None, 1.0, 1.0))[1:] for m in modules}
        return cls(shapes, blocks, block_size, model.device, algorithm_of(model), scales)

    @property
    def padding_slot(self) -> int:
        """Where a token that nobody reads is written."""
        return (next(iter(self._pairs.values())).shape[1] - 1) * self.block_size

    @property
    def storage(self) -> str:
        """How a number is held, for people."""
        return f"{self.algorithm}, 8 bits" if self.algorithm in _CODES else "16 bits"

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(pair.nbytes for pair in self._pairs.values())

    def tensors(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a layer's keys and values, [blocks + 1, block_size, K, D] each, in the type that they are held in."""
        keys, values = self._pairs[layer]
        held = _CODES[self.algorithm][1] if self.algorithm in _CODES else keys.dtype
        return keys.view(held), values.view(held)

    def scales(self, layer: int) -> tuple[float, float]:
        """Returns what a layer's stored keys, and its values, are multiplied by."""
        return self._scales[layer]

    def write(self, layer: int, slots_T: torch.Tensor, keys_TKD: torch.Tensor, values_TKD: torch.Tensor) -> None:
        """Stores a layer's keys and values at slots, `block * block_size + offset`."""
        for stored, x, scale in zip(self._pairs[layer], (keys_TKD, values_TKD), self._scales[layer], strict=True):
            stored.flatten(0, 1).index_copy_(0, slots_T, self._encode(x, scale))

    def read(self, layer: int, tables_SW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the keys and values of sequences, [S, K, W * block_size, D] each, in bfloat16."""
        sequences, width = tables_SW.shape
        found = []
        for stored, scale in zip(self._pairs[layer], self._scales[layer], strict=True):
            blocks = stored.index_select(0, tables_SW.flatten())
            rows_SLKD = blocks.view(sequences, width * self.block_size, *stored.shape[2:])
            found.append(self._decode(rows_SLKD, scale).transpose(1, 2))
        return found[0], found[1]

    def attend(
        self, layer: int, query_THD: torch.Tensor, spans: Spans, scale: float | None, window: int | None = None
    ) -> torch.Tensor:
        """Returns the attention of tokens over what is stored, [T, H, D], by the kernel of `runtime.paged_kernel`."""
        from trimtab.runtime import paged_kernel  # Triton is not on every machine

        scale = query_THD.shape[-1] ** -0.5 if scale is None else scale
        return paged_kernel.attend(query_THD, *self.tensors(layer), spans, scale, self._scales[layer], window)

    def _encode(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        if self.algorithm is None:
            return x
        if self.algorithm not in _CODES:
            return kv_cache.rounded(self.algorithm, x, scale)
        return _CODES[self.algorithm][0](x.float(), scale).view(torch.uint8)

    def _decode(self, stored: torch.Tensor, scale: float) -> torch.Tensor:
        if self.algorithm not in _CODES:
            return stored
        return stored.view(_CODES[self.algorithm][1]).bfloat16() * scale  # codes fit, so this rounds once


def check(model_type: str) -> None:
    """Refuses models that cannot be served.

    Raises:
        Failure: `unsupported`, a paged KV cache cannot hold what the family's attention keeps.
    """
    if why := families.named(model_type).no_serve:
        raise Failure("unsupported", f"a '{model_type}' cannot be served from a paged KV cache: {why}")


def attention_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the model's attention layers.

    Raises:
        Failure: `unsupported`, a paged KV cache cannot hold what they keep.
    """
    check(model.config.model_type)
    family = families.named(model.config.model_type)
    return [getattr(block, family.attention.module) for block in model.get_submodule(family.blocks)]


def key_features(model: PreTrainedModel, attention: nn.Module) -> int:
    """Returns the numbers of a token's keys in an attention layer."""
    return getattr(attention, families.named(model.config.model_type).attention.key).out_features


def algorithm_of(model: PreTrainedModel) -> str | None:
    """Returns ModelOpt's name of the format in which `kv_cache.apply` made the model read its KV cache."""
    return getattr(attention_layers(model)[0], "kv_cache", (None,))[0]


def bytes_per_token(model: PreTrainedModel) -> int:
    """Returns the bytes of keys and values of one token over all layers, as they are held here."""
    each = 1 if algorithm_of(model) in _CODES else 2
    return sum(2 * key_features(model, module) * each for module in attention_layers(model))


# ------------------------------------------------------------------------------------------------------ attention


@dataclass
class Chunk:
    """`count` tokens of a prompt that follow `before` others of it; `table_1W` are its blocks."""

    count: int
    before: int
    table_1W: torch.Tensor


@dataclass(frozen=True)
class Spans:
    """What each program of the kernel computes: a few tokens of one sequence.

    Args:
        spans_B4: int32, of each span: its first token in the pass, its tokens (0 for none), the position of the first
            in its sequence, and its sequence's row of the tables.
            Where every token has one, they stand in the tokens' order.
        tables_SW: int32, the blocks of each sequence.
        tokens: of a span at most, a power of 2.
    """

    spans_B4: torch.Tensor
    tables_SW: torch.Tensor
    tokens: int


@dataclass
class Pass:
    """Where the tokens of one forward pass stand in the cache: told by `spans` to the kernel, by the others without it.

    Args:
        slots_T: where each token's keys and values go.
        tables_SW, lengths_S: blocks and tokens, with the new one, of each sequence that decodes.
    """

    cache: PagedKVCache
    slots_T: torch.Tensor
    tables_SW: torch.Tensor | None = None
    lengths_S: torch.Tensor | None = None
    chunks: list[Chunk] = field(default_factory=list)
    spans: Spans | None = None
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def decode_mask(self, window: int | None) -> torch.Tensor:
        """Returns bool [S, 1, 1, L], True where a token may look; made once a pass, not once a layer."""
        if ("decode", window) not in self._masks:
            length = self.tables_SW.shape[1] * self.cache.block_size
            positions_L = torch.arange(length, device=self.lengths_S.device)
            seen_SL = positions_L < self.lengths_S[:, None]
            if window:
                seen_SL &= positions_L >= self.lengths_S[:, None] - window
            self._masks["decode", window] = seen_SL[:, None, None]
        return self._masks["decode", window]

    def chunk_mask(self, number: int, window: int | None) -> torch.Tensor | None:
        """Returns bool [count, before + count], or None where "causal" says it all."""
        chunk = self.chunks[number]
        length = chunk.before + chunk.count
        window = window if window and window < length else None
        if not chunk.before and not window:
            return None
        if (number, window) not in self._masks:
            positions_L = torch.arange(length, device=self.slots_T.device)
            own_T = positions_L[chunk.before :, None]
            seen_TL = positions_L <= own_T
            if window:
                seen_TL &= positions_L > own_T - window
            self._masks[number, window] = seen_TL
        return self._masks[number, window]


@torch.inference_mode()
def why_no_kernel(model: PreTrainedModel) -> str:
    """Returns why the kernel of `runtime.paged_kernel` cannot serve a model here, "" where it can.

    It is tried on one layer against the attention that it replaces: a lone token, and a chunk of a prompt.
    """
    module = attention_layers(model)[0]
    cache = PagedKVCache.for_model(model, blocks=4, block_size=16)
    size, device = module.head_dim, model.device
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, features: int) -> torch.Tensor:
        drawn = torch.randn(count, features // size, size, generator=generator)
        return drawn.transpose(0, 1)[None].bfloat16().to(device)

    def integers(numbers: list) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    table, lone, count = [3, 1, 0], 32, 33  # 33 tokens read as a chunk, and the last of them again as a lone token
    slots = integers([table[n // 16] * 16 + n % 16 for n in range(count)])
    named = families.named(model.config.model_type).attention
    query, key, value = (
        draw(count, getattr(module, name).out_features) for name in (named.query, named.key, named.value)
    )
    last = [x[:, :, lone:] for x in (query, key, value)]
    tables = integers([table])
    chunk = ([query, key, value], Pass(cache, slots, tables[:0], tables[:0, 0], [Chunk(count, 0, tables)]))
    single = (last, Pass(cache, slots[lone:], tables, integers([count])))
    chunk_spans = [[start, min(16, count - start), start, 0] for start in range(0, count, 16)]
    try:
        for (states, where), spans, tokens in ((chunk, chunk_spans, 16), (single, [[0, 1, lone, 0]], 1)):
            expected = _attention(module, *states, None, paged=where)[0].float()
            by_kernel = Pass(cache, where.slots_T, spans=Spans(integers(spans).int(), tables.int(), tokens))
            found = _attention(module, *states, None, paged=by_kernel)[0].float()
            difference = float((found - expected).abs().max() / expected.abs().max())
            if not difference < 0.02:  # NaN is not
                return f"its results differ by {difference:.1%} from those of PyTorch's attention"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no compiler, a card or a size of head that it does not know
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return ""


def use_paged_attention(model: PreTrainedModel) -> None:
    """Makes a model's forward pass read and write the cache of its argument `paged`, a `Pass`."""
    AttentionInterface.register(_NAME, _attention)  # without a mask of its own: a pass has them
    model.set_attn_implementation(_NAME)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: Pass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of T packed tokens, query [1, H, T, D] and key and value [1, K, T, D], over their sequences."""
    if softcap is not None or s_aux is not None:
        raise Failure("unsupported", f"{type(module).__name__} caps its scores or has sinks, which is not paged")
    query_THD, key_TKD, value_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    paged.cache.write(module.layer_idx, paged.slots_T, key_TKD, value_TKD)
    if paged.spans:
        return paged.cache.attend(module.layer_idx, query_THD, paged.spans, scaling, sliding_window)[None], None
    start = len(paged.lengths_S)
    parts = [decode_attention(query_THD[:start], paged, module.layer_idx, scaling, sliding_window)] if start else []
    for number, chunk in enumerate(paged.chunks):
        mask = paged.chunk_mask(number, sliding_window)
        parts.append(_read_chunk(module, query_THD[start : start + chunk.count], paged, chunk, mask, scaling))
        start += chunk.count
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def decode_attention(
    query_SHD: torch.Tensor, paged: Pass, layer: int, scaling: float | None, window: int | None
) -> torch.Tensor:
    """One query a sequence. The query heads that share a head of keys stand where several queries would: so keys and
    values are neither repeated for them nor need a kernel that knows of groups."""
    keys, values = paged.cache.read(layer, paged.tables_SW)
    sequences, heads, size = query_SHD.shape
    query_SKGD = query_SHD.reshape(sequences, keys.shape[1], -1, size)
    out = F.scaled_dot_product_attention(query_SKGD, keys, values, paged.decode_mask(window), scale=scaling)
    return out.reshape(sequences, heads, size)


def _read_chunk(
    module: nn.Module,
    query_THD: torch.Tensor,
    paged: Pass,
    chunk: Chunk,
    mask: torch.Tensor | None,
    scaling: float | None,
) -> torch.Tensor:
    keys, values = (x[:, :, : chunk.before + chunk.count] for x in paged.cache.read(module.layer_idx, chunk.table_1W))
    groups = query_THD.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    query = query_THD.transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(query, keys, values, mask, is_causal=mask is None, scale=scaling)
    return out[0].transpose(0, 1)
