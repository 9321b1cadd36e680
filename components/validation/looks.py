"""What is measured in a look at an attempt: which work, on which items and windows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trimtab import stages
from trimtab.loop.evidence import CONFIRMATION, look_name
from trimtab.planning.dealing import Deal, Spans
from trimtab.recipe.evaluation import Evaluation

_MEASURE = "trimtab.components.validation.evaluation.measure"
EVALUATE = stages.work_stage(
    "evaluate", f"{_MEASURE}:evaluate", "evaluation", stages.Environment(("lm-eval",), measured=True), version=3
)
COMPARE_SPEED = stages.work_stage("speed", f"{_MEASURE}:compare_speed", "speed", stages.MEASURED, version=2)
#: It loads the export in the embedded engine, as far as this device can.
INTEGRITY = stages.work_stage(
    "integrity",
    "trimtab.components.validation.integrity.gate:inspect",
    "integrity",
    stages.Environment(stages.QUANTIZED.libraries, measured=True),
    version=5,
)
#: What the attempt itself is asked, with the KV cache that its recipe asks for.
OWN_LOOKS = {look_name(look) for look in range(1, CONFIRMATION + 1)}
#: What is measured beside the attempt, and no part of its page.
BASELINE_LOOKS = {look_name(look, baseline=True) for look in range(1, CONFIRMATION + 1)}


def evaluation_parameters(
    settings: Evaluation,
    items: Spans,
    windows: list[int],
    speed: bool,
    *,
    max_length: int,
    kv_cache: str = "export",
) -> dict[str, Any]:
    """Returns the parameters of `EVALUATE`, which are part of its key in the store.

    `kv_cache` "none" runs an export with its KV cache in 16 bits; the other way is no part of the key.
    """
    return {
        "tasks": list(settings.tasks),
        "task_path": settings.task_path,
        "filters": settings.filters,
        "items": items,
        "windows": windows,
        "all_windows": sum(settings.windows) + (settings.confirm_windows if settings.confirm_items else 0),
        "window_tokens": settings.window_tokens,
        "max_length": max_length,
        "heldout": settings.heldout,
        "speed": speed,
        **({} if kv_cache == "export" else {"kv_cache": kv_cache}),
    }


def looks(settings: Evaluation, deal: Deal) -> Iterator[tuple[Spans, list[int]]]:
    """Yields for each look the items of each task and the windows that it adds, as [start, stop]."""
    window = 0
    for number, windows in enumerate(settings.windows, start=1):
        yield deal.look(number), [window, window + windows]
        window += windows


def fresh(settings: Evaluation, deal: Deal, earlier: int) -> tuple[Spans, list[int]]:
    """Returns the items and windows of a confirmation, of which there were `earlier` ones in the run.

    Its items are those of no look and, as long as the tasks have enough, of no earlier confirmation; its windows, of
    which a text has few, are the same for all.
    """
    windows = sum(settings.windows)
    return deal.confirm(earlier), [windows, windows + settings.confirm_windows]
