"""How a release was made: parameters, materials and builder, as SLSA's provenance v1.

https://slsa.dev/spec/v1.0/provenance
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from trimtab.base import environment

PREDICATE = "https://slsa.dev/provenance/v1"
BUILD = "trimtab:optimize/v1"
#: The container image of a task, where its environment names one.
IMAGE = "TRIMTAB_IMAGE"


def statement(name: str, evidence: Mapping[str, Any], files: Mapping[str, str], issued: datetime) -> dict[str, Any]:
    """Returns the in-toto statement whose subjects are the files of the artifact, path -> SHA-256."""
    materials = evidence.get("materials") or {}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": path, "digest": {"sha256": digest}} for path, digest in sorted(files.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": {
                    "name": name,
                    "recipe": evidence["recipe"],
                    **{field: evidence[field] for field in ("goal", "target", "max_attempts", "evaluation")},
                },
                "internalParameters": {"device": evidence["device"]},
                "resolvedDependencies": dependencies(evidence, materials),
            },
            "runDetails": {
                "builder": {"id": os.environ.get(IMAGE) or BUILD, "version": evidence["versions"]},
                "metadata": {"finishedOn": issued.isoformat().replace("+00:00", "Z")},
            },
        },
    }


def dependencies(evidence: Mapping[str, Any], materials: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns what went in: the base model, texts by their digests, trimtab at its commit, images and libraries."""
    found: list[dict[str, Any]] = [{"name": "base model", "digest": {"sha256": evidence["model"]["digest"]}}]
    for use, texts in datasets(materials).items():
        found += [{"name": f"{use}: {text}", **({"digest": {"sha256": d}} if d else {})} for text, d in texts.items()]
    if commit := environment.commit():
        found.append({"name": "trimtab", "digest": {"gitCommit": commit}})
    found += [{"name": "container image", "uri": image} for image in (materials.get("images") or "").split()]
    versions = evidence["versions"].items()
    return found + [{"uri": f"pkg:pypi/{package}@{version}"} for package, version in versions if package != "python"]


def datasets(materials: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Returns the texts and tasks of a run by their use, each with the SHA-256 of its file, "" where there is none."""
    recipe, evaluation = materials.get("recipe") or {}, materials.get("evaluation") or {}
    found = {
        "calibration": _named(recipe.get("calibrate")) | dict(materials.get("calibration_data") or {}),
        "distillation": _named(recipe.get("distill")) | dict(materials.get("distillation_data") or {}),
        "evaluation": dict.fromkeys(evaluation.get("tasks") or (), "") | dict(materials.get("measured_data") or {}),
    }
    return {use: texts for use, texts in found.items() if texts}


def _named(section: Mapping[str, Any] | None) -> dict[str, str]:
    text = (section or {}).get("text") or []
    sources = [text] if isinstance(text, str) else text
    return {source if isinstance(source, str) else str(source.get("text")): "" for source in sources}
