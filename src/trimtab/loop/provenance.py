"""The materials of a run: everything that its release depends on, each by a digest or a version.

The word is SLSA's (https://slsa.dev/spec/v0.2/provenance, `materials`). A release says in its evidence what it was
made of, so that a rebuild can tell whether anything would come out differently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from trimtab.base import environment
from trimtab.base.schema import Document
from trimtab.recipe import Recipe, Source, files
from trimtab.recipe.evaluation import Evaluation
from trimtab.recipe.workload import Recorded
from trimtab.serving.traffic import Traffic, drift
from trimtab.store.tree import Tree

_DIGEST = re.compile(r"[0-9a-f]{64}")
#: How many times as large a measure of the traffic may become before it counts as another material.
DRIFT: float = Recorded.model_fields["drift"].default
#: Longest value that a sentence about a difference quotes, in characters.
_QUOTED = 60


class Provenance(Document):
    """What a run is made of.

    `model` is the digest of the base model's tree; `recipe` and `evaluation` are whole, with their defaults, so that a
    changed default counts. `calibration_data`, `distillation_data` and `measured_data` are {path: SHA-256} of the files
    that these name and that are where the run is planned. A dataset on the Hugging Face hub counts by its name alone:
    there is no digest of it before it is read. `images` are those of the stages, `versions` those where it is planned.
    `workload` is what engines were sized for, where the recipe states it, `traffic` where it was recorded. `converted`
    says what the model's source stored otherwise than its tree does.
    """

    model: str
    recipe: dict[str, Any]
    calibration_data: dict[str, str] = {}
    distillation_data: dict[str, str] = {}
    measured_data: dict[str, str] = {}
    goal: str
    target: str
    max_attempts: int
    evaluation: dict[str, Any]
    images: str
    versions: dict[str, str]
    workload: dict[str, Any] | None = None
    traffic: Traffic | None = None
    converted: tuple[str, ...] = ()


def gather(
    *,
    model: Tree,
    recipe: Recipe,
    goal: str,
    target: str,
    max_attempts: int,
    evaluation: Evaluation,
    images: str,
    traffic: Traffic | None = None,
    converted: Sequence[str] = (),
) -> Provenance:
    """Returns the materials of a run that is planned here and now.

    Args:
        converted: as the metadata of the model's tree has it.
        traffic: what was recorded; then the recipe's workload is made of it, and counts for nothing itself.
    """
    stated = None if traffic else recipe.workload
    distilled = recipe.distill.texts if recipe.distill else ()
    measured = [text for text in (evaluation.heldout, evaluation.task_path) if text]
    return Provenance(
        model=model.digest,
        recipe=recipe.model_dump(mode="json", exclude={"workload", "limits"}),
        calibration_data=_contents(recipe.calibrate.sources),
        distillation_data=_contents(Source(text=text) for text in distilled),
        measured_data=_contents(Source(text=text) for text in measured),
        goal=goal,
        target=target,
        max_attempts=max_attempts,
        evaluation=evaluation.model_dump(mode="json"),
        images=images,
        versions=environment.versions(),
        workload=stated and stated.model_dump(mode="json"),
        traffic=traffic,
        converted=tuple(converted),
    )


def differences(before: Provenance, now: Provenance, most: float = DRIFT) -> dict[str, list[str]]:
    """Returns the fields that differ, each with sentences for people: 'recipe.quantize.format: fp8 → int4_awq'.

    Args:
        most: how many times as large, or as small, a measure of the recorded traffic may be and count as the same.
    """
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    found = {
        field: [f"{path}: {_short(a)} → {_short(b)}" for path, a, b in _differing(field, old[field], new[field])]
        for field in Provenance.model_fields
        if old[field] != new[field] and field != "traffic"
    }
    moved = _drift(before.traffic, now.traffic, most)
    return {**found, **({"traffic": moved} if moved else {})}


def _drift(before: Traffic | None, now: Traffic | None, most: float) -> list[str]:
    if before is None or now is None:
        if before is now:
            return []
        said = [shape.sentence if shape else "none" for shape in (before, now)]
        return [f"traffic: {said[0]} → {said[1]}"]
    return [
        f"traffic: {sentence}, more than {most:g}" for times, sentence in drift(before, now).values() if times > most
    ]


def _contents(sources: Any) -> dict[str, str]:
    return files.with_files({}, sources).get("files", {})


def _differing(path: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields the innermost values that differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            if before.get(name) != now.get(name):
                yield from _differing(f"{path}.{name}", before.get(name), now.get(name))
    else:
        yield path, before, now


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    if _DIGEST.fullmatch(text):
        return text[:12]
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"
