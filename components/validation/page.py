"""What the page of an attempt and its metrics show: the verdict, and what was measured on the attempt itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trimtab import report, stages
from trimtab.judge import Verdict
from trimtab.loop.state import State
from trimtab.stages.looks import BASELINE_LOOKS
from trimtab.store import Store
from trimtab.store.tree import Tree


def html(store: Store, state: State, measured: Mapping[str, Tree]) -> str:
    """Returns the page of an attempt that has its verdict.

    Args:
        measured: the trees of what was measured, by the names of `trimtab.loop.evidence`.
    """
    return report.attempt_html(
        state,
        kernels=own_file(store, state, measured, "kernels.json"),
        layers=own_file(store, state, measured, "layers.json"),
        calibration=own_file(store, state, measured, "calibration.json"),
        arithmetic=own_file(store, state, measured, "arithmetic.json") or "",
        reload=own_file(store, state, measured, "reload.json"),
        distillation=_distillation(store, state),
        forecast=stages.forecast(state),
    )


def own_file(store: Store, state: State, measured: Mapping[str, Tree], name: str) -> Any:
    """Returns a JSON file of what was measured on this attempt or calibrated on, or None."""
    calibration = state.trees.get("calibration")
    own = [tree for look, tree in measured.items() if look not in BASELINE_LOOKS]
    for tree in (*own, *([calibration] if calibration else [])):
        path = store.get(tree) / name
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
    return None


def numbers(result: Verdict) -> dict[str, Any]:
    """Returns the metrics that the attempt has in KFP."""
    found: dict[str, Any] = {"accepted": float(result.outcome == "accepted"), "items": result.items}
    measured = result.measurements.model_dump(exclude={"by_block"})
    found |= {name: value for name, value in measured.items() if value or not result.measurements.by_block}
    if result.accuracy:
        found["accuracy"] = result.accuracy.estimate
    if result.perplexity:
        found["perplexity"] = result.perplexity
    if result.recovery and result.perplexity_ratio:
        found |= {
            "recovery": result.recovery.estimate,
            "perplexity_ratio": result.perplexity_ratio.estimate,
        }
    if card := result.damage:
        known = [task.recovery.estimate for task in card.tasks if task.task == card.worst and task.recovery]
        found |= {"worst_task_recovery": known[0]} if known else {}
        found |= {"kl_divergence": card.kl.estimate} if card.kl else {}
        found |= {"same_likeliest_token": card.agreement.estimate} if card.agreement else {}
    return found


def _distillation(store: Store, state: State) -> dict[str, Any] | None:
    """Returns the metrics of this attempt's training; its tree, a whole model, stays where it is."""
    checkpoint = state.trees.get("checkpoint")
    if checkpoint is None or "distill" not in state.seconds:  # it may be an earlier run's student
        return None
    record = store.lookup(store.manifest(checkpoint).metadata["key"])
    return record["metrics"] if record and "curve" in record["metrics"] else None
