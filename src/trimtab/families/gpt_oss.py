"""gpt-oss: experts with biases and a gate of their own, windows in every second block, sinks in attention."""

from __future__ import annotations

from trimtab.families.family import Family
from trimtab.families.parts import Experts

#: `fetch` puts the experts, which are stored as one tensor, apart: a layer each, gate and up no longer interleaved.
GPT_OSS = Family(
    "gpt_oss",
    mlp=None,
    experts=Experts(plain=("router",), size="intermediate_size"),
    no_serve="its attention has sinks, which the engine's kernels do not know",
)
FAMILIES = (GPT_OSS,)
