"""Gemma: norms that multiply by one plus their weight, embeddings that are scaled; every text begins with BOS."""

from __future__ import annotations

from dataclasses import replace

from trimtab.families.family import Family, Limit
from trimtab.families.parts import Attention, Mlp

GEMMA = Family("gemma", norm="1 + w", bos=True, tensor_parallel=True)
_CAPPED = "and the engine scores with what the output head gives alone"


def _uncapped(logits: float | None, attention: float | None) -> tuple[Limit, ...]:
    """Caps of logits and of attention's scores, with what transformers takes where config.json is silent."""
    in_attention = "and PyTorch's attention has no such cap"
    return (
        Limit("final_logit_softcapping", logits, (None,), _CAPPED),
        Limit("attn_logit_softcapping", attention, (None,), in_attention),
    )


#: Since Gemma 2 a norm stands on both sides of each part of a block.
_BETWEEN = Mlp(norm="pre_feedforward_layernorm")
FAMILIES = (
    GEMMA,
    replace(GEMMA, model_type="gemma2", mlp=_BETWEEN, limits=_uncapped(30.0, 50.0)),
    replace(
        GEMMA,
        model_type="gemma3_text",
        attention=Attention(head_norms=("q_norm", "k_norm")),
        mlp=_BETWEEN,
        limits=_uncapped(None, None),
    ),
)
