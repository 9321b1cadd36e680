"""Writes the reference of the documents that a user writes: `make docs`. With --check it only names what is stale.

A page a document, in docs/reference: each section of its JSON schema is a table of its fields, with what each may be,
what it is where nothing is said, and what it means. Nothing on these pages is written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from trimtab.pipelines.documents import DOCUMENTS, UsersOwn

REFERENCE = Path(__file__).resolve().parent / "reference"
#: JSON schema's limits, in words.
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
_SIZES = {"minItems": "at least {} of them", "maxItems": "at most {} of them", "minLength": "not empty"}


def page(document: UsersOwn) -> str:
    """Returns the reference of one document, in Markdown."""
    schema = document.schema
    sections = {name: part for name, part in schema.get("$defs", {}).items() if part.get("properties")}
    tops = [schema] if "properties" in schema else [sections[_name(part)] for part in schema["anyOf"]]
    kinds = [kind.__name__ for kind in document.kinds]
    rest = [name for name in sections if name not in kinds]
    parts = [f"# The {document.name}", f"{document.purpose[0].upper()}{document.purpose[1:]}."]
    parts.append(
        f"`trimtab {document.name} --example` prints what follows, `--check FILE` says whether a file is one, and\n"
        "`--schema` prints this page as a JSON schema. `make docs` writes it out of that schema."
    )
    parts.append(f"```yaml\n{document.example}```")
    for kind, part in zip(kinds, tops, strict=True):
        parts += [f"## {kind}", part["description"], _table(part, schema)]
    for name in sorted(rest):
        parts += [f"## {name}", sections[name]["description"], _table(sections[name], schema)]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[Path, str]:
    """Returns each page's file and text."""
    return {REFERENCE / f"{name}.md": page(document) for name, document in DOCUMENTS.items()}


def _table(section: dict[str, Any], schema: dict[str, Any]) -> str:
    required = section.get("required", [])
    lines = ["| field | may be | default | meaning |", "|---|---|---|---|"]
    for name, field in section["properties"].items():
        default = "required" if name in required else _value(field.get("default"))
        default = "its own" if isinstance(field.get("default"), dict) else default
        meaning = field.get("description") or schema["$defs"][_name(field)]["description"]
        cells = (f"`{name}`", _kind(field), default, " ".join(meaning.split()))
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(lines)


def _kind(field: dict[str, Any]) -> str:
    """Returns what a field may be, in words; a section is a link to its table."""
    if "$ref" in field:
        return f"[{_name(field)}](#{_name(field).lower()})"
    if "const" in field:
        return _value(field["const"])
    if "enum" in field:
        return ", ".join(_value(value) for value in field["enum"])
    for choice in ("anyOf", "oneOf"):
        if choice in field:
            kinds = [_kind(part) for part in field[choice] if part.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if field.get("type") == "array":
        inside = field.get("items") or {}
        told = "list of " + (_kind(inside) if inside else "values")
        if "prefixItems" in field:
            told = f"list [{', '.join(_kind(part) for part in field['prefixItems'])}]"
    elif field.get("type") == "object":
        values = field.get("additionalProperties")
        told = "mapping" + (f" to {_kind(values)}" if isinstance(values, dict) and values else "")
    else:
        told = field.get("type", "any value")
    limits = [f"{word} {field[key]}" for key, word in _LIMITS.items() if key in field]
    limits += [word.format(field[key]) for key, word in _SIZES.items() if field.get(key)]
    limits += [f"by `{field['pattern']}`"] if "pattern" in field else []
    return ", ".join([told, *limits])


def _name(field: dict[str, Any]) -> str:
    """Returns the name of the section that a field refers to."""
    return field["$ref"].rpartition("/")[2]


def _value(value: Any) -> str:
    return "" if value in (None, "", [], {}) else f"`{json.dumps(value, ensure_ascii=False)}`"


def main(arguments: list[str] | None = None) -> int:
    """Renews the pages; returns 1 where one is stale and --check is given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is stale")
    check, stale = parser.parse_args(arguments).check, []
    for path, text in pages().items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if check:
            stale.append(f"{path.name} is stale: run make docs")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"docs/reference/{path.name} is new")
    print(*stale, sep="\n", end="\n" if stale else "", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
