"""`trimtab deploy`: from a release in S3 to a service, through a kubeconfig."""

from __future__ import annotations

from pathlib import Path

import pytest
from registry_server import RegistryServer
from releases import Released

from trimtab.pipelines.commands import main
from trimtab.store import open_store

SETTINGS = """
service: assistant
namespace: serving
image: registry/vllm:1
command: [vllm, serve, "{model}"]
loader: registry/trimtab:1
"""


@pytest.fixture
def server(kubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "rollout.yaml").write_text(SETTINGS)
    monkeypatch.chdir(tmp_path)
    return kubernetes


def trimtab(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = main.main(["deploy", *options, "--rollout", "rollout.yaml"])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, " ".join((said.out + said.err).split())


def test_deploy(server, s3_server, capsys, monkeypatch, tmp_path):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{s3_server.bucket}/deploy")
    released = []
    for name in ("first", "second"):
        (folder := tmp_path / name).mkdir()
        released.append(Released(store, folder, weights=name.encode()))
    (uri, digest), (other, worse) = ((made.uri, made.evidence["export"]["digest"]) for made in released)
    key = ("--key", str(tmp_path / "first" / "gate.pub"))
    code, said = trimtab(capsys, uri, *key, "--dry-run")
    assert (code, "+ name: assistant" in said, server.service) == (0, True, None), said
    registry = RegistryServer()
    code, said = trimtab(capsys, uri, *key, "--registry", registry.host)
    registry.close()
    assert "tiny 000001 entered in the registry" in said
    assert registry.kept["artifacts"][0]["uri"] == uri
    assert (code, f"assistant serves {digest[:12]}" in said) == (0, True), said
    code, said = trimtab(capsys, other, *key)
    assert (code, f"{other} is refused: " in said) == (5, True), "another key's"
    server.answers = {worse: None}
    code, said = trimtab(capsys, other)
    assert (code, "leaves 8 of 8 prompts without an answer" in said) == (3, True), said
    assert trimtab(capsys, uri, "--context", "elsewhere")[0] == 2


def test_approve_and_refuse(server, s3_server, capsys, monkeypatch, tmp_path):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{s3_server.bucket}/approve")
    made = Released(store, tmp_path)
    digest = made.evidence["export"]["digest"][:12]
    code, said = trimtab(capsys, made.uri, "--approve")
    assert (code, "no rollout of it waits for approval" in said) == (2, True), said
    server.approvals = {"assistant": f"waiting {digest}: 8 prompts"}
    code, said = trimtab(capsys, made.uri, "--approve", "--by", "the owner")
    assert (code, said) == (0, f"assistant: approved {digest}")
    assert server.approvals == {"assistant": f"approved {digest} by the owner"}
    server.approvals = {"assistant": f"waiting {digest}: 8 prompts"}
    code, said = trimtab(capsys, made.uri, "--refuse")
    assert (code, server.approvals) == (0, {"assistant": f"refused {digest}"}), said
    assert server.applied == []


BAD = [
    (["releases/model/000001"], "cannot be read from a cluster; write s3://bucket/prefix/releases/NAME/VERSION"),
    (["/store/releases/model/000001"], "cannot be read from a cluster"),
    (["s3://bucket/prefix"], "cannot be read from a cluster"),
    (["s3://b/p/releases/m/000001", "--by", "her"], "by: 'her' answers nothing; write --approve or --refuse with it"),
    (["s3://b/p/releases/m/000001", "--approve", "--refuse"], "--refuse: not allowed with argument --approve"),
    (["s3://b/p/releases/m/000001", "--approve", "--dry-run"], "--dry-run: not allowed with argument --approve"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input(options, message, server, capsys):
    code, said = trimtab(capsys, *options)
    assert (code, message in said) == (2, True), said
