"""The base of trimtab's documents: immutable, validated on parsing, digestible, YAML and JSON.

A bad document raises an InputError that names the field, the value and the nearest valid one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Tag, ValidationError

from trimtab.errors import InputError, nearest


def digest(value: Any) -> str:
    """Returns the SHA-256 of a JSON value in canonical form (sorted keys, no spaces), as 64 hex digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def mapping(source: str | Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Returns the mapping in a YAML or JSON text, or the mapping itself.

    Raises:
        InputError: not YAML, or no mapping; `what` names the document.
    """
    if isinstance(source, str):
        try:
            source = yaml.safe_load(source)
        except yaml.YAMLError as error:
            where = " ".join(str(error).split())
            raise InputError(f"the {what} is not valid YAML or JSON: {where}") from None
    if not isinstance(source, Mapping):
        raise InputError(f"the {what} must be a mapping of fields, got {type(source).__name__}")
    return source


class Document(BaseModel):
    """A frozen pydantic model that refuses unknown keys and prints only what differs from its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def parse(cls, source: str | Mapping[str, Any]) -> Self:
        """Reads a YAML or JSON text, or a mapping.

        Raises:
            InputError: not YAML, an unknown key, or a value out of range; names field, value and remedy.
        """
        source = mapping(source, cls.__name__.lower())
        try:
            return cls.model_validate(source)
        except ValidationError as error:
            raise InputError("; ".join(_explain(cls, item) for item in error.errors())) from None

    def to_json(self) -> str:
        """Returns the document as compact JSON; `parse` reads it back to an equal document."""
        return json.dumps(self.to_dict(), separators=(",", ":"), ensure_ascii=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data without the fields that have their defaults."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def to_yaml(self) -> str:
        """Returns the document as YAML for people."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def _explain(cls: type[BaseModel], item: Mapping[str, Any]) -> str:
    """Turns one pydantic error into a sentence: where, what was written, what to write instead."""
    kind, context = item["type"], item.get("ctx", {})
    path, valid_keys = _walk(cls, item["loc"])
    where = ".".join(path) or cls.__name__.lower()
    if kind == "extra_forbidden":
        return f"{where}: unknown key '{path[-1]}'; {nearest(path[-1], valid_keys)}"
    if kind == "missing":
        return f"{where}: is required"
    if kind == "literal_error":
        return (
            f"{where}: {item['input']!r} is not valid; {nearest(item['input'], _listed(context['expected']))}"
        )
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = context["discriminator"].strip("'")
        if kind == "union_tag_not_found":
            return f"{where}.{tag}: is required"
        remedy = nearest(context["tag"], _listed(context["expected_tags"]))
        return f"{where}.{tag}: {context['tag']!r} is not valid; {remedy}"
    if kind == "tuple_type":
        return f"{where}: {item['input']!r} is not a list; write [{item['input']}]"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not path:  # what two sections say together; the message names them, and the input is the whole document
        return message
    return f"{where}: {item['input']!r} {message}"


def _listed(text: str) -> list[str]:
    """Splits pydantic's "'a', 'b' or 'c'"."""
    return [part.strip().strip("'") for part in text.replace(" or ", ", ").split(",")]


def _walk(cls: type[BaseModel], location: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """Follows pydantic's location: returns it as the user wrote it, and the keys valid at its last step.

    Pydantic puts the chosen member of a tagged union into the location ('prune', 'depth', 'blocks', or
    'calibrate', 'text', 'mix', 0); the user wrote no such step.
    """
    classes, path, tags = [cls], [], set()
    for number, part in enumerate(location):
        if part in tags:
            tags = set()
            continue
        members = [
            model
            for c in classes
            if part in c.model_fields
            for model in _models(c.model_fields[part].annotation)
        ]
        tags = {t for c in classes if part in c.model_fields for t in _tags(c.model_fields[part].annotation)}
        tag = (
            len(classes) > 1
            and number < len(location) - 1
            and not any(part in c.model_fields for c in classes)
        )
        if tag:
            classes = [c for c in classes if part in str(c.model_fields)] or classes
            continue
        path.append(str(part))
        if members and number < len(location) - 1:
            classes = members
    return path, sorted({name for c in classes for name in c.model_fields})


def _tags(annotation: Any) -> list[str]:
    """The tags of a union that a function tells apart."""
    own = [item.tag for item in getattr(annotation, "__metadata__", ()) if isinstance(item, Tag)]
    return own + [tag for part in getattr(annotation, "__args__", ()) for tag in _tags(part)]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]
