"""What tests of evidence share: a store in a folder, and answers that a model gave."""

from __future__ import annotations

import pytest
from releases import scores_in

from trimtab.store import open_store


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def scored(store, tmp_path):
    return scores_in(store, tmp_path)
