"""The entry in the Kubeflow Model Registry, over HTTP to a stand-in."""

from __future__ import annotations

import pytest
from registry_server import RegistryServer

from trimtab.base.errors import InputError, StageError
from trimtab.components.deployment.registry import TOKEN, register

pytest.importorskip("model_registry", reason="model-registry is not installed: pip install 'trimtab[registry]'")
URI = "s3://bucket/store/releases/model/000001"
RECORD = {
    "artifact": {"digest": "a" * 64},
    "goal": "lower_cost",
    "target": "h100",
    "recipe": {"quantize": {"format": "fp8"}},
    "verdict": {"outcome": "accepted", "reason": "it is still good"},
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(TOKEN, raising=False)
    found = RegistryServer()
    yield found
    found.close()


def test_registered_once(server):
    assert register(server.host, "model", "000001", URI, RECORD) is True, server.log
    assert register(server.host, "model", "000001", URI, RECORD) is False
    (model,), (version,), (artifact,) = server.kept.values()
    assert (model["name"], version["name"], artifact["uri"]) == ("model", "000001", URI)
    properties = {name: value["string_value"] for name, value in version["customProperties"].items()}
    assert properties == {"artifact": "a" * 64, "goal": "lower_cost", "target": "h100", "format": "fp8"}
    assert version["description"] == "it is still good"


def test_a_version_that_is_something_else_there(server):
    """Of another store, or left without its artifact by a client that was killed."""
    register(server.host, "model", "000001", URI, RECORD)
    other = "s3://elsewhere/releases/model/000001"
    with pytest.raises(InputError, match=f"has model 000001 already, of {URI} and not of {other}; archive or rename"):
        register(server.host, "model", "000001", other, RECORD)
    server.kept["artifacts"].clear()
    with pytest.raises(InputError, match=f"has model 000001 already, of no artifact and not of {URI}"):
        register(server.host, "model", "000001", URI, RECORD)


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [(401, InputError, f"set another {TOKEN}"), (403, InputError, "refuses"), (404, StageError, "answered 404")],
)
def test_refused(status, kind, message, server):
    server.refuse = status
    with pytest.raises(kind, match=message):
        register(server.host, "model", "000001", URI, RECORD)


@pytest.mark.parametrize(
    ("address", "message"),
    [("registry:8080", "write https://host"), ("https://registry", f"wants a token; set {TOKEN}")],
)
def test_bad_input(address, message, server):
    with pytest.raises(InputError, match=message):
        register(address, "model", "000001", URI, RECORD)


def test_nobody_there(server):
    with pytest.raises(StageError, match="does not answer"):
        register("http://127.0.0.1:1", "model", "000001", URI, RECORD)
