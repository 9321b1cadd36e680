"""Under which licence a model is published, as far as its files say so: the card's front matter, then config.json.

It is copied and not judged: what it allows, a person reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trimtab.model.files import CONFIG, read_json

#: The key in the metadata of a model's tree: {"id", "name", "link"}, as far as they are known; absent if none is.
LICENCE = "licence"
CARD = "README.md"
#: A card's beginning is read as far as this, in bytes.
_CARD_BYTES = 1 << 20
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
#: What the hub calls licences -> SPDX's identifiers (https://huggingface.co/docs/hub/repositories-licenses,
#: https://spdx.org/licenses/), of those that open models have; any other is told by its name.
_SPDX = {
    "apache-2.0": "Apache-2.0",
    "mit": "MIT",
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "cc0-1.0": "CC0-1.0",
    "cc-by-4.0": "CC-BY-4.0",
    "cc-by-sa-4.0": "CC-BY-SA-4.0",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "cc-by-nc-sa-4.0": "CC-BY-NC-SA-4.0",
    "mpl-2.0": "MPL-2.0",
    "agpl-3.0": "AGPL-3.0-only",
}


def licence_of(folder: Path) -> dict[str, str]:
    """Returns what the files of a model folder say of its licence; {} where they are silent."""
    card = _front_matter(folder / CARD)
    said = card if card.get("license") else _config(folder)
    names = {"id": "license", "name": "license_name", "link": "license_link"}
    found = {key: said.get(field) for key, field in names.items()}
    found["id"] = found["id"][0] if isinstance(found["id"], list) and found["id"] else found["id"]
    return {key: value.strip() for key, value in found.items() if isinstance(value, str) and value.strip()}


def title(licence: Mapping[str, str]) -> str:
    """Returns the licence's name for people, "" where nothing is known."""
    if spdx := spdx_of(licence):
        return spdx
    return licence.get("name") or licence.get("id", "")


def spdx_of(licence: Mapping[str, str]) -> str:
    """Returns SPDX's identifier, "" where there is none that is sure."""
    return _SPDX.get(licence.get("id", "").lower(), "")


def _front_matter(path: Path) -> Mapping[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            found = _FRONT.match(file.read(_CARD_BYTES))
        read = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError):
        return {}
    return read if isinstance(read, dict) else {}


def _config(folder: Path) -> Mapping[str, Any]:
    return read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
