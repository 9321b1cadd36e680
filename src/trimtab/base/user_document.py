"""Documents that a person writes: each field is described where it stands, and the class holds an example.

A field's description is the text below it; the JSON schema, an editor's help and the pages of `trimtab … --schema` have
it from there. The example is the block after `Example::` in the docstring of the class.
"""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from trimtab.base.schema import Document

_EXAMPLE = "Example::"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _without_example(schema: dict[str, Any], cls: type[BaseModel]) -> None:
    schema["description"] = " ".join(inspect.getdoc(cls).partition(_EXAMPLE)[0].split())


class UserDocument(Document):
    """A document, or a section of one, that a person writes: the text below a field is its description."""

    model_config = ConfigDict(use_attribute_docstrings=True, json_schema_extra=_without_example)


def example(cls: type[UserDocument]) -> str:
    """Returns the example in the docstring of a document, as YAML; "" where there is none."""
    block = inspect.getdoc(cls).partition(_EXAMPLE)[2]
    return textwrap.dedent(block).strip("\n") + "\n" if block.strip() else ""


def json_schema(*kinds: type[UserDocument], title: str) -> dict[str, Any]:
    """Returns the JSON schema of a document that is one of these kinds, with a description of every field.

    It admits whatever `parse` admits. Rules that tie several fields together are told by `parse` alone.
    """
    union = kinds[0]
    for kind in kinds[1:]:
        union |= kind
    return {"$schema": _DIALECT, **TypeAdapter(union).json_schema(), "title": title}
