"""Which back ends this machine has, asked without importing any of them."""

from __future__ import annotations

import importlib.util

from trimtab.base.environment import has_gpu
from trimtab.catalog.backends import BACKENDS
from trimtab.catalog.contracts import version
from trimtab.model.hardware import Hardware
from trimtab.recipe import Engine
from trimtab.serving import vllm

#: From the one that serves fastest to the one that runs everywhere.
BEST_FIRST = ("trtllm", "trtllm-legacy", "vllm", "torch")


def refusal(settings: Engine) -> str | None:
    """Returns why this image cannot serve with a recipe's back end, in one sentence, or None when it can."""
    backend, library = settings.backend, BACKENDS[settings.backend].library
    if not library:
        return None
    found = vllm.installed() if library == "vLLM" else version.installed()
    if found is None:
        return f"engine.backend: '{backend}' is not part of this image, for it has no {library}; write 'torch'"
    if reason := vllm.refusal(found) if library == "vLLM" else version.refusal(backend, found):
        return reason
    if settings.tensorrt_llm and version.parse(settings.tensorrt_llm) != version.parse(found):
        reason = f"engine.tensorrt_llm: {settings.tensorrt_llm} is asked for, and this image has {found}"
        return f"{reason}; run the stage in an image with that version, or write {found}"
    return None


def backends(hardware: Hardware) -> list[str]:
    """Returns the back ends that are installed here and serve a target, the best first.

    All but torch need a GPU, which torch only uses where there is one.
    """
    found = [name for name in BEST_FIRST if name in hardware.formats and refusal(Engine(backend=name)) is None]
    return [name for name in found if (_has_torch() if name == "torch" else has_gpu())]


def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None
