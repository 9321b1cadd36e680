"""The attention over a paged KV cache, in the place of a model's own: by the kernel, or by PyTorch's attention.

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

from trimtab.base.errors import Failure
from trimtab.runtime.checkpoint.skeleton import family_of
from trimtab.runtime.kernels.replacements import capped_attention
from trimtab.runtime.kernels.spans import Spans
from trimtab.runtime.kv_cache.paged import PagedKVCache, attention_layers

_NAME = "trimtab_paged"


@dataclass
class Chunk:
    """`count` tokens of a prompt that follow `before` others of it; `table_1W` are its blocks."""

    count: int
    before: int
    table_1W: torch.Tensor


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
    """Returns why the kernel of `runtime.kernels.paged_attention` cannot serve a model here, "" where it can.

    It is tried on one layer against the attention that it replaces: a lone token, and a chunk of a prompt.
    """
    module = attention_layers(model)[0]
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        return "it does not cap scores"
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
    named = family_of(model).attention
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
    if s_aux is not None:
        raise Failure("unsupported", f"{type(module).__name__} has sinks, which are not paged")
    query_THD, key_TKD, value_TKD = (x[0].transpose(0, 1) for x in (query, key, value))
    paged.cache.write(module.layer_idx, paged.slots_T, key_TKD, value_TKD)
    if paged.spans:
        return paged.cache.attend(module.layer_idx, query_THD, paged.spans, scaling, sliding_window)[None], None
    start = len(paged.lengths_S)
    lone = query_THD[:start]
    parts = [decode_attention(lone, paged, module.layer_idx, scaling, sliding_window, softcap)] if start else []
    for number, chunk in enumerate(paged.chunks):
        mask = paged.chunk_mask(number, sliding_window)
        parts.append(_read_chunk(module, query_THD[start : start + chunk.count], paged, chunk, mask, scaling, softcap))
        start += chunk.count
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def decode_attention(
    query_SHD: torch.Tensor,
    paged: Pass,
    layer: int,
    scaling: float | None,
    window: int | None,
    cap: float | None = None,
) -> torch.Tensor:
    """One query a sequence. The query heads that share a head of keys stand where several queries would: so keys and
    values are neither repeated for them nor need a kernel that knows of groups."""
    keys, values = paged.cache.read(layer, paged.tables_SW)
    sequences, heads, size = query_SHD.shape
    if cap is not None:
        mask = paged.decode_mask(window)
        return capped_attention(query_SHD[:, :, None], keys, values, mask, scaling, cap)[:, :, 0]
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
    cap: float | None,
) -> torch.Tensor:
    keys, values = (x[:, :, : chunk.before + chunk.count] for x in paged.cache.read(module.layer_idx, chunk.table_1W))
    query = query_THD.transpose(0, 1)[None]
    if cap is not None:
        whole = None if mask is None else mask[None, None]
        return capped_attention(query, keys, values, whole, scaling, cap)[0].transpose(0, 1)
    groups = query_THD.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    out = F.scaled_dot_product_attention(query, keys, values, mask, is_causal=mask is None, scale=scaling)
    return out[0].transpose(0, 1)
