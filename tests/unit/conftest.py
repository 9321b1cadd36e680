"""What tests of decisions share: empty stores, and answers that a model gave."""

from __future__ import annotations

import uuid

import pytest
from releases import scores_in

from trimtab.store import open_store


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "store"))


@pytest.fixture(params=["folder", "s3"])
def both(request, tmp_path, monkeypatch):
    """An empty store of either kind and an empty cache; subprocesses find both through the environment."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    server = request.getfixturevalue("s3_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return open_store(f"s3://{server.bucket}/{uuid.uuid4().hex}/deep")


@pytest.fixture
def scored(store, tmp_path):
    return scores_in(store, tmp_path)
