"""Immutable trees of files, results of stages and releases, in S3 or a folder, behind one small interface."""

from trimtab.store.store import Store, open_store
from trimtab.store.tree import Blob, Manifest, Tree

__all__ = ["Blob", "Manifest", "Store", "Tree", "open_store"]
