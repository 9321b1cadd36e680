"""Work in a process of its own, where no engine meets what another left, and the rows that say what it found."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from machine import describe, log

from trimtab.base import child

#: Of the processes that are started: vLLM reads its own when it is imported, and benchmarks are imported from here.
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))),
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),  # it logs to stdout
    "TRIMTAB_PROGRESS": os.devnull,  # the terminal is for rows
}
#: Seconds after which a process is ended.
LIMIT = 300


def call(work: str, **arguments: Any) -> dict[str, Any]:
    """Calls "module:function" in a process of its own; returns what it does and `seconds`, or `error`."""
    log(" ".join([work.partition(":")[2], *(str(v) for v in arguments.values() if not isinstance(v, dict))]))
    os.environ |= ENVIRONMENT
    started = time.perf_counter()
    try:
        found = child.call(work, time_limit=LIMIT, **arguments).value
    except Exception as error:  # the others are worth having
        found = {"error": describe(error)}
    return {**found, "seconds": round(time.perf_counter() - started, 1)}


def tell(row: dict[str, Any], out: Path | None) -> None:
    """Prints a row, and adds it to a file of JSON lines, if there is one."""
    line = json.dumps(row)
    print(line, flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
