"""Does the export load, compute numbers, and write text? In the embedded engine, whichever will serve it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trimtab.base.errors import Failure, InputError
from trimtab.components.validation.evaluation.generation import generate, is_degenerate
from trimtab.recipe import Engine
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.engines import kept
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.text import token_windows as texts

#: A continuation of fewer is too short to call a repetition.
NEW_TOKENS = 24


def check(export: Path, source: Path) -> dict[str, Any]:
    """Loads the export and lets it continue a few prompts.

    A model whose own text goes round in a loop cannot be blamed for it, and a loop is a matter of chance: small
    models fall into one after a change of 1 %. So only when all continuations of the export are degenerate does its
    source continue the same prompts, and one loop of its own acquits, as does a source that the device does not hold.
    The evaluation, which writes more, judges then.

    Returns:
        `skipped`, why the embedded engine cannot run this export, or None; `outputs`, prompt -> continuation.

    Raises:
        Failure: `export_damaged`; it does not load, its logits are not finite, or all that it writes is empty or a
            repetition while nothing is that its source writes.
    """
    try:
        engine = kept.loaded(export, Engine())
    except InputError as error:
        raise Failure("export_damaged", f"it cannot be loaded: {error}") from None
    except Failure as failure:
        if failure.failure_class == "does_not_fit":  # one device; it may be served on several, or in fewer bytes
            return {"skipped": f"it does not fit the memory of one {_device()}", "outputs": {}}
        if failure.failure_class != "unsupported":
            raise
        return {"skipped": failure.reason, "outputs": {}}
    written = generate(engine, NEW_TOKENS)
    _check_finite(engine, written)
    outputs = {prompt: engine.tokenizer.decode(tokens) for prompt, tokens in written.items()}
    if _is_ruined(written) and not _is_excused(export, source):
        prompt, text = next(iter(outputs.items()))
        what = f"all that it writes is empty or a repetition, after '{prompt}' it is '{text}'"
        raise Failure("export_damaged", f"{what}; nothing that its source writes is")
    return {"skipped": None, "outputs": outputs}


def _is_ruined(written: dict[str, list[int]]) -> bool:
    return all(map(is_degenerate, written.values()))


def _is_excused(export: Path, source: Path) -> bool:
    """Whether the KV cache is to blame, which the evaluation judges apart from the weights, or the source loops too."""
    if Export(export).kv_cache_algo:
        weights_alone = kept.loaded(export, Engine(), kv_cache="none")
        if not _is_ruined(generate(weights_alone, NEW_TOKENS)):
            return True
    if not kept.could_hold(source):
        return True
    theirs = generate(kept.loaded(source, Engine()), NEW_TOKENS)
    return any(map(is_degenerate, theirs.values()))


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


@torch.inference_mode()
def _check_finite(engine: TorchEngine, written: dict[str, list[int]]) -> None:
    for prompt, tokens in written.items():
        ids = [*texts.encode(engine.tokenizer, prompt), *tokens]
        logits = engine.model(torch.tensor([ids], device=engine.device), use_cache=False).logits
        if not torch.isfinite(logits).all():
            raise Failure("export_damaged", f"its logits after '{prompt}' are not all finite")
