"""The bill of materials of a release, CycloneDX 1.6 with its model card: what the model consists of and was made with.

Written as plain JSON, for cyclonedx-python-lib 11 has no model cards; its validator checks it in the tests
(https://cyclonedx.org/docs/1.6/json/).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from trimtab.model.licence import spdx_of, title
from trimtab.release.build_provenance import datasets
from trimtab.release.task_scores import TaskScore

_NAMESPACE = uuid.UUID("6f6d0c0e-5f0d-5e2c-9f0b-0d6a5b0e7a11")


def bom(
    name: str,
    version: str,
    evidence: Mapping[str, Any],
    architecture: str,
    files: Mapping[str, str],
    scores: Sequence[TaskScore],
    issued: datetime,
    licence: Mapping[str, str],
) -> dict[str, Any]:
    """Returns the document.

    Args:
        architecture: the class of the model.
        files: those of the artifact, path -> SHA-256.
        scores: by task, what the unchanged model and this one answer rightly.
        licence: the base model's, as `model.licence` has it; {} where nothing is known.
    """
    artifact, model = evidence["export"]["digest"], evidence["model"]["digest"]
    materials = evidence.get("materials") or {}
    used = [(use, text, checksum) for use, texts in datasets(materials).items() for text, checksum in texts.items()]
    data = [
        {
            "type": "data",
            "bom-ref": f"data-{number}",
            "name": text,
            "description": use,
            "data": [{"type": "dataset", "name": text}],
            **({"hashes": [_sha256(checksum)]} if checksum else {}),
        }
        for number, (use, text, checksum) in enumerate(used)
    ]
    libraries = [
        {"type": "library", "bom-ref": f"{package}@{number}", "name": package, "version": number,
         "purl": f"pkg:pypi/{package}@{number}"}
        for package, number in sorted(evidence["versions"].items()) if package != "python"
    ]  # fmt: skip
    base = {
        "type": "machine-learning-model",
        "bom-ref": "base-model",
        "name": "base model",
        "description": "the model before anything was done to it"
        + ("" if licence else "; its licence is unknown: neither its card nor its config names one"),
        "hashes": [_sha256(model)],
        **_licences(licence),
    }
    subject = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": version,
        "description": evidence["verdict"]["reason"],
        "hashes": [_sha256(artifact)],
        **_licences(licence),
        "components": [
            {"type": "file", "bom-ref": f"file-{path}", "name": path, "hashes": [_sha256(digest)]}
            for path, digest in sorted(files.items())
        ],
        "pedigree": {"ancestors": [{key: value for key, value in base.items() if key != "bom-ref"}]},
        "modelCard": {
            "modelParameters": {
                "task": "text-generation",
                "architectureFamily": "transformer",
                "modelArchitecture": architecture,
                "datasets": [{"ref": component["bom-ref"]} for component in data],
            },
            "quantitativeAnalysis": {"performanceMetrics": [metric for score in scores for metric in _metrics(score)]},
        },
        "properties": [{"name": f"trimtab:{field}", "value": str(evidence[field])} for field in ("goal", "target")]
        + [{"name": "trimtab:recipe", "value": _plain(evidence["recipe"])}],
    }
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, f'{name}/{version}/{artifact}')}",
        "version": 1,
        "metadata": {"timestamp": issued.isoformat().replace("+00:00", "Z"), "component": subject},
        "components": [base, *data, *libraries],
        "dependencies": [
            {"ref": "model", "dependsOn": ["base-model", *(component["bom-ref"] for component in (*data, *libraries))]}
        ],
    }


def _metrics(score: TaskScore) -> list[dict[str, Any]]:
    return [
        {
            "type": f"accuracy, {who}",
            "value": f"{interval.estimate:.4f}",
            "slice": score.task,
            "confidenceInterval": {"lowerBound": f"{interval.low:.4f}", "upperBound": f"{interval.high:.4f}"},
        }
        for who, interval in (("this model", score.candidate), ("base model", score.baseline))
    ]


def _licences(licence: Mapping[str, str]) -> dict[str, Any]:
    """Returns the field `licenses`; by SPDX's identifier where that is sure, else by name."""
    if not licence:
        return {}
    spdx = spdx_of(licence)
    said = {"id": spdx} if spdx else {"name": title(licence)}
    if licence.get("link", "").startswith(("https://", "http://")):
        said["url"] = licence["link"]
    return {"licenses": [{"license": said}]}


def _sha256(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest}


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
