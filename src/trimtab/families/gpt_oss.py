"""gpt-oss: experts with biases and a gate of their own, windows in every second block, sinks in attention."""

from __future__ import annotations

from trimtab.families.family import Family
from trimtab.families.parts import Experts

#: `fetch` puts the experts, which are stored as one tensor, apart: a layer each, gate and up no longer interleaved.
GPT_OSS = Family(
    "gpt_oss",
    mlp=None,
    experts=Experts(plain=("router",), vector="router.bias", biased=True, size="intermediate_size"),
    head_dim=64,
    qkv_bias=("attention_bias", True),
    output_bias=("attention_bias", True),
    others=lambda config, sizes: {"model.layers.{}.self_attn.sinks": (sizes.heads,)},
    no_serve="its attention has sinks, which the engine's kernels do not know",
)
FAMILIES = (GPT_OSS,)
