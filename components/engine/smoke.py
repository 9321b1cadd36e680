"""Opens a built engine as validation will, and lets it score and write a few tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trimtab.base import progress
from trimtab.base.errors import Failure
from trimtab.serving import record

PROMPT = "The quick brown fox"


def smoke(engine: str, export: str) -> dict[str, Any]:
    """Returns the engine's own figures: kernels, arithmetic, weight_bytes, device_bytes. One that goes block by block
    writes nothing.

    Raises:
        Failure: `unsupported`, a back end that this image does not have; `export_damaged`, the export does not
            load or its outputs are not numbers; `degenerate_output`, it writes nothing.
    """
    from trimtab.runtime.engines.backends import open_engine
    from trimtab.runtime.text import token_windows

    progress.report("engine", "warm load")
    built, served = record.read(Path(engine)), open_engine(Path(engine), Path(export))
    prompt = token_windows.encode(served.tokenizer, PROMPT)
    likelihood, _ = served.loglikelihood([(prompt[:1], prompt[1:])])[0]
    if not math.isfinite(likelihood):
        raise Failure("export_damaged", f"the likelihood of '{PROMPT}' is {likelihood}")
    if not built.settings.by_block and not served.generate([prompt], max_new_tokens=8)[0]:
        raise Failure("degenerate_output", f"the engine generates nothing after '{PROMPT}'")
    figures = ("arithmetic", "weight_bytes", "device_bytes")
    found = {"kernels": served.kernels(), **{name: getattr(served, name) for name in figures}}
    served.close()
    return found
