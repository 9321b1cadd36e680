"""The base of trimtab's documents: immutable, validated on parsing, digestible, YAML and JSON.

A bad document raises an InputError that names the field, the value and the nearest valid one: `schema_errors` says how.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from trimtab.base.errors import InputError
from trimtab.base.schema_errors import explain


def digest(value: Any) -> str:
    """Returns the SHA-256 of a JSON value in canonical form (sorted keys, no spaces), as 64 hex digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice in a mapping, of which it would keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in first:
                raise InputError(f"'{key.value}' stands twice, on lines {first[name]} and {line}; remove one of them")
            first[name] = line
        return node


def mapping(source: str | Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Returns the mapping in a YAML or JSON text, or the mapping itself.

    Raises:
        InputError: not YAML, a key twice, or no mapping; `what` names the document.
    """
    if isinstance(source, str):
        try:
            source = yaml.load(source, _Loader)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date without its day is a ValueError
            where = " ".join(str(error).split())
            raise InputError(f"the {what} is not valid YAML or JSON: {where}") from None
        except InputError as error:
            raise InputError(f"the {what} is not valid: {error}") from None
    if source is None:
        raise InputError(f"the {what} is empty; write its fields, such as {{name: value}}")
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
            told = dict.fromkeys(explain(cls, source, item) for item in error.errors())  # members of a union may agree
            raise InputError("; ".join(told)) from None

    def to_json(self) -> str:
        """Returns the document as compact JSON; `parse` reads it back to an equal document."""
        return json.dumps(self.to_dict(), separators=(",", ":"), ensure_ascii=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data without the fields that have their defaults."""
        return self.model_dump(mode="json", exclude_defaults=True)

    def to_yaml(self) -> str:
        """Returns the document as YAML for people."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
