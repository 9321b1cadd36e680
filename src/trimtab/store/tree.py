"""A tree: an immutable folder in the store, named by its content."""

from __future__ import annotations

from trimtab.schema import Document


class Tree(Document):
    """A folder in the store: its URI, the digest that the URI ends in, and its size in bytes."""

    uri: str
    digest: str
    bytes: int = 0
