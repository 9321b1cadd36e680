"""The back end of a run on this machine: the one that its recipe names, or the best one that is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from trimtab.base.errors import InputError
from trimtab.base.schema import mapping
from trimtab.model.hardware import Hardware
from trimtab.planning import installed
from trimtab.recipe import Recipe


def choose(recipe: str, target: Hardware, ladder: Callable[[str], Any] | None = None) -> tuple[str, str]:
    """Returns the recipe with its back end, and a sentence that says which that is and why.

    Args:
        recipe: YAML or JSON, or "".
        ladder: plans a recipe, and raises an InputError where the target cannot run it; None where the model is not
            known yet.

    Raises:
        InputError: the back end that the recipe names is not installed, none is that serves the target, or no recipe
            can be run with one.
    """
    document = dict(mapping(recipe, "recipe")) if recipe.strip() else {}
    settings = Recipe.parse(document).engine
    if settings.model_fields_set & {"backend", "tensorrt_llm"}:
        if ladder:
            ladder(recipe)
        if reason := installed.refusal(settings):
            raise InputError(reason)
        return recipe, f"{settings.backend}, as the recipe says{_device(target)}"
    found = installed.backends(target)
    if not found:
        raise InputError(
            f"target: none of the back ends that serve {target.name} ({', '.join(target.backends)}) is installed here; "
            f"write pip install 'trimtab[torch]', or give the run to a cluster with trimtab submit"
        )
    refused = None
    for backend in found:
        named = json.dumps({**document, "engine": {**(document.get("engine") or {}), "backend": backend}}, default=str)
        try:
            if ladder:
                ladder(named)
        except InputError as error:
            refused = refused or error
            continue
        return named, f"{backend}, the best that is installed here for {target.name}{_device(target)}"
    raise refused


def _device(target: Hardware) -> str:
    if target.compute_capability is None or installed.has_gpu():
        return ""
    return f"; this machine has no GPU, so speeds and memory are its own and not those of {target.name}"
