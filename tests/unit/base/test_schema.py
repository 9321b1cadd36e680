"""Documents: immutable, digestible, the same after YAML and JSON."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trimtab.base.errors import InputError
from trimtab.base.schema import Document, digest
from trimtab.recipe import Recipe

RECIPE = Recipe.parse(
    "{name: grün, prune: {method: depth, blocks: 2}, quantize: {format: mixed, effective_bits: 5.5, exclude: []}}"
)


def test_json_and_yaml_read_back():
    assert Recipe.parse(RECIPE.to_json()) == Recipe.parse(RECIPE.to_yaml()) == Recipe.parse(RECIPE.to_dict()) == RECIPE


def test_only_what_differs_from_the_defaults_is_written():
    assert RECIPE.to_json() == (
        '{"name":"grün","prune":{"method":"depth","blocks":2},'
        '"quantize":{"format":"mixed","effective_bits":5.5,"exclude":[]}}'
    )
    assert Recipe().to_json() == "{}"


def test_frozen():
    with pytest.raises(ValidationError):
        RECIPE.name = "other"


def test_digest_is_that_of_canonical_json():
    assert digest({"b": [1, None], "a": "ä"}) == hashlib.sha256('{"a":"ä","b":[1,null]}'.encode()).hexdigest()


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.floats(allow_nan=False)))
def test_digest_does_not_depend_on_the_order_of_keys(document):
    assert digest(document) == digest(dict(reversed(document.items())))


@given(st.integers(), st.integers())
def test_digest_tells_documents_apart(left, right):
    assert (digest({"a": left}) == digest({"a": right})) == (left == right)


class Asked(Document):
    stop: str | list[str] | None = None
    prompt: str | list[int] | list[list[int]] = ""


UNIONS = [
    ({"stop": {}}, "stop: {} should be a valid string; stop: {} is not a list; write []"),
    ({"stop": ["a", 1]}, "stop.1: 1 is not how YAML reads a text without quotes; write '1'"),
    ({"prompt": [[1.5]]}, "prompt.0.0: 1.5 should be a valid integer"),
]


@pytest.mark.parametrize(("given", "said"), UNIONS)
def test_a_union_of_plain_types_is_explained(given, said):
    """Pydantic names the member that it tried in the place of the error; the document has no such key."""
    with pytest.raises(InputError, match=re.escape(said)):
        Asked.parse(given)
