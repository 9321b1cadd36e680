"""A paged KV cache for transformers' models; FP8 and INT8 are held in 8 bits. `paged_attention` reads it.

transformers has a paged cache of its own (`generate_batch`), and it runs with packed linears. It holds 16 bits alone,
so an export's FP8 or INT8 KV cache would be another in service than in judgement; and without FlashAttention its SDPA
path lays all sequences side by side and lets each look at all, work that grows with the square of the batch.

Axes in names: T packed tokens of a pass, S sequences, L tokens of the longest, W blocks of a table, H query heads,
K heads of keys and values, D numbers of a head.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from trimtab import families
from trimtab.base.errors import Failure
from trimtab.catalog.kv_caches import BY_ALGORITHM
from trimtab.runtime.checkpoint import few_bits
from trimtab.runtime.checkpoint.skeleton import family_of
from trimtab.runtime.kernels.spans import Spans
from trimtab.runtime.kv_cache import emulated

#: Formats that are stored in 8 bits: how codes are made, and the type that they are read as. What is rounded and
#: multiplied by its scale again is, bit for bit, `kv_cache.rounded`.
_TYPES = {"e4m3": (few_bits.to_fp8, torch.float8_e4m3fn), "int8": (few_bits.to_int8, torch.int8)}
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
        """Returns the attention of tokens over what is stored, [T, H, D], by the kernel of
        `runtime.kernels.paged_attention`.
        """
        from trimtab.runtime.kernels import paged_attention  # Triton is not on every machine

        scale = query_THD.shape[-1] ** -0.5 if scale is None else scale
        return paged_attention.attend(query_THD, *self.tensors(layer), spans, scale, self._scales[layer], window)

    def _encode(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        if self.algorithm is None:
            return x
        if self.algorithm not in _CODES:
            return emulated.rounded(self.algorithm, x, scale)
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
    check(family_of(model).model_type)
    family = family_of(model)
    return [getattr(block, family.attention.module) for block in model.get_submodule(family.blocks)]


def key_features(model: PreTrainedModel, attention: nn.Module) -> int:
    """Returns the numbers of a token's keys in an attention layer."""
    return getattr(attention, family_of(model).attention.key).out_features


def algorithm_of(model: PreTrainedModel) -> str | None:
    """Returns ModelOpt's name of the format in which `kv_cache.apply` made the model read its KV cache."""
    return getattr(attention_layers(model)[0], "kv_cache", (None,))[0]


def bytes_per_token(model: PreTrainedModel) -> int:
    """Returns the bytes of keys and values of one token over all layers, as they are held here."""
    each = 1 if algorithm_of(model) in _CODES else 2
    return sum(2 * key_features(model, module) * each for module in attention_layers(model))
