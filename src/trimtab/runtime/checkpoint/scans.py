"""State-space layers as they are computed here: few sequences at once, in short chunks.

Without kernels of their own, transformers' Mamba layers hold a state for every token that they read: 26 GB for 8,192
tokens of a layer with 3,072 channels and 256 numbers for each. Those of the second kind also hold what pairs of tokens
of a chunk have to do with each other: 103 GB more, with 48 heads and chunks of 256. What they compute depends neither
on how many sequences they read at once nor, but for the order of sums, on the size of a chunk.

Of Nemotron-H's it does: transformers 5.14 sums what chunks hand on over the wrong axis, and gets texts wrong that are
longer than a chunk. So its layers go by Mamba 2's loop, which is the same but for that. And the norm of Falcon-H1's
layers drops the axis of tokens where there is one, which mixes up the sequences of a batch.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import nn
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from trimtab.families.state_space import ROOM

#: Tokens of a chunk, which transformers pads each sequence to; configs have 128 or 256. With half as many as a head is
#: wide, pairs of tokens hold half of what the states of all tokens do.
CHUNK = 32


def bound(model: nn.Module) -> None:
    """Makes a model's state-space layers read few sequences at once, and short chunks of them."""
    for module in model.modules():
        if type(module) is FalconH1RMSNormGated:
            module.__class__ = _GatedNorm
        if not hasattr(module, "ssm_state_size"):
            continue
        if isinstance(module, NemotronHMamba2Mixer):
            module.time_step_limit = (module.time_step_min, math.inf)  # what its own loop keeps time steps in
        module.__class__ = _in_parts(type(module))
        if getattr(module, "chunk_size", 0) > CHUNK:
            module.chunk_size = CHUNK


@functools.cache
def _in_parts(kind: type[nn.Module]) -> type[nn.Module]:
    loop = {"torch_forward": Mamba2Mixer.torch_forward} if kind is NemotronHMamba2Mixer else {}
    return type(kind.__name__, (_InParts, kind), loop)


class _GatedNorm(FalconH1RMSNormGated):
    """Falcon-H1's norm, which keeps the axis of tokens where there is one token."""

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        if hidden_states.shape[1] > 1:
            return super().forward(hidden_states, gate)
        return super().forward(hidden_states[:, 0], gate[:, 0])[:, None]


class _InParts(nn.Module):
    """A state-space layer, called as transformers' own: without a cache a part of the batch after the other."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        if cache_params is not None:
            return super().forward(hidden_states, cache_params, attention_mask, **others)
        count, length = hidden_states.shape[:2]
        padded = -(-length // CHUNK) * CHUNK
        needed = 4 * count * padded * self.intermediate_size * self.ssm_state_size
        parts = min(count, -(-needed // ROOM[hidden_states.device.type]))
        if attention_mask is not None:  # which transformers leaves aside where there is one sequence
            parts = min(parts, count // 2)
        if parts <= 1:
            return super().forward(hidden_states, None, attention_mask, **others)
        masks = [None] * parts if attention_mask is None else attention_mask.tensor_split(parts)
        each = zip(hidden_states.tensor_split(parts), masks, strict=True)
        return torch.cat([super(_InParts, self).forward(part, None, mask, **others) for part, mask in each])
