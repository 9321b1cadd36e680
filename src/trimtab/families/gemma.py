"""Gemma: norms that multiply by one plus their weight, embeddings that are scaled; every text begins with BOS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from trimtab.families.family import Family, Logits
from trimtab.families.parts import Attention, Config, Mlp

GEMMA = Family(
    "gemma",
    norm="1 + w",
    head_dim=256,
    bos=True,
    output_bias=("attention_bias", False),
    tensor_parallel=True,
)


def _capped(by_default: float | None) -> Callable[[Config], Logits]:
    """The cap of the logits, with what transformers takes where config.json is silent."""
    return lambda config: Logits(cap=config.get("final_logit_softcapping", by_default))


#: Since Gemma 2 a norm stands on both sides of each part of a block.
_BETWEEN = Mlp(norm="pre_feedforward_layernorm")
_BEFORE = ("input_layernorm", "pre_feedforward_layernorm")
_BOTH = (*_BEFORE, "post_attention_layernorm", "post_feedforward_layernorm")
FAMILIES = (
    GEMMA,
    # Gemma 2 caps the scores of its attention too, which the engine does by its config.
    replace(GEMMA, model_type="gemma2", mlp=_BETWEEN, norms=_BOTH, logits=_capped(30.0)),
    replace(GEMMA, model_type="vaultgemma", mlp=_BETWEEN, norms=_BEFORE, logits=_capped(30.0)),
    replace(
        GEMMA,
        model_type="gemma3_text",
        attention=Attention(head_norms=("q_norm", "k_norm")),
        mlp=_BETWEEN,
        norms=_BOTH,
        logits=_capped(None),
    ),
)
