"""A run of the real DAG on this machine, a tripwire that tells whether any of its processes did model work, and results
that were filed for it."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_server import KubernetesServer
from rich.console import Console

from trimtab.base import environment
from trimtab.components import images
from trimtab.components.fetch.source import fetch
from trimtab.store import open_store

from .filed import KV_RECIPE, Script

#: Stands before the real torch in the path of every process of a run. It writes down that it was asked for, and
#: ends the import as the environment says: an expected failure of the stage, a kill for memory or
#: by somebody, or no torch at all.
TRIPWIRE = """
import os, signal
with open(os.environ["TRIPPED"], "a") as file:
    file.write("torch\\n")
kind, _, reason = os.environ.get("FAILING", "").partition(":")
if kind == "ended":
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "killed":
    with open(os.environ["OOM_COUNTER"], "w") as file:
        file.write("oom_kill 1")
    os.kill(os.getpid(), signal.SIGKILL)
if kind:
    from trimtab.base.errors import Failure
    raise Failure(kind, reason)
raise ImportError("this run must not need torch")
"""


#: Python runs it first in every process: they all look at the feigned counter of kills.
SITE = """
import os
if "OOM_COUNTER" in os.environ:
    from pathlib import Path
    from trimtab.base import kills
    kills.COUNTERS = (Path(os.environ["OOM_COUNTER"]),)
"""


@pytest.fixture(scope="session", autouse=True)
def an_image_is_named() -> Iterator[None]:
    """What is compiled here names the image of this version, as a site names that of its registry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(images.VARIABLE, images.CPU)
        yield


@dataclass(frozen=True)
class Tripwire:
    """Says whether torch was asked for."""

    record: Path

    @property
    def touched(self) -> bool:
        return self.record.exists()

    def reset(self) -> None:
        self.record.unlink(missing_ok=True)


@pytest.fixture
def tripwire(tmp_path: Path, oom_counter: Path, monkeypatch: pytest.MonkeyPatch) -> Tripwire:
    package = tmp_path / "tripwire" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TRIPWIRE)
    (package.parent / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    monkeypatch.setenv("TRIPPED", str(tmp_path / "tripped"))
    return Tripwire(tmp_path / "tripped")


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    """A cluster, which this process and those that it starts find by a kubeconfig."""
    found = KubernetesServer()
    found.slow = 0
    config = {
        "clusters": [{"name": "a", "cluster": {"server": found.host}}],
        "users": [{"name": "a", "user": {}}],
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
        "current-context": "a",
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
    yield found
    found.close()


@pytest.fixture
def run_dag(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A function: runs `optimize` through kfp.local and returns the Outcome; `unrolled` attempts at most."""
    from trimtab.pipelines import local, optimize

    def run(arguments: dict[str, Any], folder: Path, unrolled: int | None = None) -> Any:
        for name in ("TRIMTAB_PROGRESS", "TRIMTAB_RUN_PID"):  # a run sets them for its processes
            monkeypatch.setenv(name, os.environ.get(name, ""))
        if unrolled:
            monkeypatch.setattr(
                local, "optimize_pipeline", lambda **_: optimize.optimize_pipeline(unrolled=unrolled)
            )
        return local.run(arguments, folder, Console(file=sys.stderr, width=200))

    return run


#: A version is read from all that a package says of itself, ten milliseconds for each of hundreds of results.
_installed = functools.cache(environment.installed)


@pytest.fixture
def versions_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed", lambda packages: dict(_installed(tuple(packages))))


@pytest.fixture
def script(tmp_path: Path, write_model: Callable[..., Path], versions_once: None) -> Script:
    write_model(tmp_path / "model")
    store = open_store(str(tmp_path / "store"))
    return Script(store, fetch(str(tmp_path / "model"), store), tmp_path / "filed")


@pytest.fixture
def kv_script(tmp_path: Path, write_model: Callable[..., Path], versions_once: None) -> Script:
    """Its ladder begins with the user's recipe, and goes on as without one."""
    write_model(tmp_path / "model")
    store = open_store(str(tmp_path / "store"))
    return Script(store, fetch(str(tmp_path / "model"), store), tmp_path / "filed", KV_RECIPE)
