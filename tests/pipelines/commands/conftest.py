"""The command as a person runs it, in this process, and a Kubeflow Pipelines server that it talks to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kfp_server import KfpServer

from trimtab.base import progress
from trimtab.pipelines.cluster import watch
from trimtab.pipelines.commands import main
from trimtab.stages.profile import Profile

RUN = ["--model", "org/tiny", "--store", "s3://bucket/store"]
ROLLOUT = "{service: assistant, namespace: serving, image: 'a/vllm:1', command: [serve], loader: 'a/b:1'%s}"


@pytest.fixture
def trimtab(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function: runs the command and returns its exit code and what it prints, on one line."""

    def run(*options: object) -> tuple[int, str]:
        code = main.main([str(option) for option in options])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, " ".join((said.out + said.err).split())

    return run


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("package") / "optimize.yaml"
    assert main.main(["compile", "-o", str(output), "--max-attempts", "2"]) == 0
    return output


@pytest.fixture
def server(package: Path, monkeypatch: pytest.MonkeyPatch):
    """A server, to which a pipeline that was compiled once goes; no pause between two looks."""
    found = KfpServer()

    def write(output: Path, unrolled: int, image: str, profile: Profile, pipeline: str) -> None:
        output.write_bytes(package.read_bytes() + f"# {image}, {pipeline}, {unrolled} attempts\n".encode())

    monkeypatch.setattr("trimtab.pipelines.package.write", write)
    monkeypatch.setattr(watch, "INTERVAL", 0.0)
    monkeypatch.setattr(watch.watch, "__defaults__", (0.0,))
    monkeypatch.setenv("TRIMTAB_KFP_HOST", found.host)
    monkeypatch.setenv("HOME", str(package.parent))
    for name in ("TRIMTAB_KFP_NAMESPACE", "TRIMTAB_KFP_TOKEN", "TRIMTAB_KFP_CA", progress.ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    yield found
    found.close()
