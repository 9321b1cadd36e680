"""The real pipeline in containers: unprivileged, with a read-only root file system and without a network.

What passes as a process of this Python may still need root, the home folder, a download or a package that the
image lacks. Here every stage runs as it would in a pod.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from kfp import local
from rich.console import Console

from trimtab.base.errors import InputError
from trimtab.loop.documents import ATTEMPT
from trimtab.pipelines import local as pipelines
from trimtab.recipe.evaluation import Evaluation
from trimtab.store import open_store

pytestmark = [pytest.mark.containers, pytest.mark.slow]

UID = 1000
RECIPE = """
name: eight bits
calibrate: {samples: 2, length: 64}
quantize: {format: int8_wo}
accept: {min_recovery: 0.5, max_perplexity_ratio: 1.5}
"""
EVALUATION = Evaluation(
    tasks=(tiny.TASK,),
    items=(30, 30, 30),
    windows=(4, 4, 4),
    window_tokens=64,
    confirm_items=60,
    confirm_windows=4,
)
#: What a container finds out about itself, as JSON.
PROBE = """
import json, os, pathlib, socket, tempfile

FOLDERS = "/", "/opt/trimtab", "/etc", "/usr", "/home", "/tmp", os.environ["HOME"]

def writable(folder):
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False

import getpass, kfp, torch, trimtab
print(json.dumps({
    "uid": os.getuid(),
    "user": getpass.getuser(),
    "writable": [f for f in FOLDERS if writable(f)],
    "interfaces": sorted(os.listdir("/sys/class/net")),
    "trimtab": str(pathlib.Path(trimtab.__file__).parent),
    "secrets": sorted(n for n in os.environ if "SECRET" in n or "TOKEN" in n or "PASSWORD" in n),
}))
"""


@pytest.fixture(scope="module")
def work(outside: Callable[[str], Path]) -> dict[str, Path]:
    folders = {name: outside(name) for name in ("store", "cache", "runs", "model", "tasks")}
    tiny.write_model(folders["model"])
    tiny.write_tasks(folders["tasks"], folders["model"])
    for file in folders["model"].iterdir():
        file.chmod(0o644)  # safetensors makes its files readable for their owner alone
    return folders


@pytest.fixture(scope="module")
def pod(work: dict[str, Path]) -> dict[str, Any]:
    """The arguments of `containers.run` that make a container as strict as a hardened pod."""
    from docker.types import Mount

    def mount(name: str, read_only: bool) -> Mount:
        return Mount(str(work[name]), str(work[name]), type="bind", read_only=read_only)

    return {
        "read_only": True,
        "tmpfs": {"/tmp": "rw,mode=1777,size=1g"},
        "mounts": [
            mount("store", False),
            mount("cache", False),
            mount("model", True),
            mount("tasks", True),
        ],
        "network_mode": "none",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "environment": {"TRIMTAB_CACHE": str(work["cache"])},
    }


@pytest.fixture(scope="module")
def run(work: dict[str, Path], pod: dict[str, Any], image: str) -> Callable[..., pipelines.Outcome]:
    """A function: runs the pipeline in containers, with some parameters changed."""
    arguments = {
        "model": str(work["model"]),
        "store": work["store"].as_uri(),
        "goal": "fit_larger_model",
        "target": "cpu",
        "recipe": RECIPE,
        "max_attempts": 2,
        "name": "tiny",
        "evaluation": EVALUATION.model_copy(update={"task_path": str(work["tasks"])}).to_json(),
    }

    def run(**changed: Any) -> pipelines.Outcome:
        runs = work["runs"] / str(len(list(work["runs"].iterdir())))
        console = Console(file=sys.stderr, width=200)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("TRIMTAB_PROGRESS", "TRIMTAB_RUN_PID"):  # a run sets them for its processes
                patch.setenv(name, "")
            return pipelines.run(arguments | changed, runs, console, runner=local.DockerRunner(**pod))

    return run


@pytest.fixture(scope="module")
def first(podman: Any, run: Callable[..., pipelines.Outcome], image: str) -> tuple[pipelines.Outcome, int]:
    """How the first run ended, and how many containers of the image it started."""
    began = time.time()
    outcome = run()
    events = podman.events(since=int(began), until=int(time.time()) + 1, filters={"event": ["start"]}, decode=True)
    return outcome, sum(event["from"] == image for event in events)


@pytest.mark.parametrize(("user", "uid"), [(None, UID), ("12345:0", 12345)], ids=["own user", "any user"])
def test_a_container_can_write_nothing_but_tmp(podman, image, pod, user, uid):
    output = podman.containers.run(image, ["python3", "-c", PROBE], user=user, remove=True, **pod)
    seen = json.loads(output.decode().splitlines()[-1])
    assert seen["uid"] == uid
    assert seen["user"] == "trimtab"
    assert seen["writable"] == ["/tmp", "/tmp"]
    assert seen["interfaces"] == ["lo"]
    assert seen["trimtab"].startswith("/opt/trimtab/lib/")
    assert seen["secrets"] == []


def test_a_release_is_made_in_containers(first, work):
    outcome, _ = first
    assert outcome.error is None, outcome.log.read_text(encoding="utf-8")[-6000:]
    store = open_store(work["store"].as_uri())
    release = store.read_release(outcome.release)
    baseline, accepted = outcome.state.baseline.verdict, outcome.state.history[-1].verdict
    assert accepted.outcome == "accepted"
    assert release["evidence"]["digest"] == outcome.state.history[-1].evaluation.digest
    assert store.manifest(release["artifact"]["uri"]).files
    assert baseline.accuracy.low > 1 / 4, "the baseline must be above chance"
    assert accepted.measurements.bytes < baseline.measurements.bytes
    assert outcome.page.stat().st_size > 1000


def test_every_stage_ran_in_a_container_of_another_user(first, work):
    outcome, containers = first
    stages = list(outcome.log.parent.rglob("executor_output.json"))
    assert len(stages) == containers >= 20
    written = [*stages, *work["store"].rglob("*"), *work["cache"].rglob("*")]
    owners = {path.stat().st_uid for path in written}
    assert len(owners) == 1 and os.getuid() not in owners


def test_the_same_run_again_does_no_stage_s_work(first, run, work):
    before = _results(work["store"])
    again = run()
    assert again.error is None
    assert again.release == first[0].release
    assert _results(work["store"]) == before


def test_a_stage_that_fails_in_its_container_fails_the_run(run):
    outcome = run(model="/no/such/model")
    assert isinstance(outcome.error, InputError)
    assert "/no/such/model" in str(outcome.error)
    assert outcome.release is None


def _results(store: Path) -> dict[str, int]:
    """Every stage's result, tree and release by name, with the time when it was written.

    A run writes down how each attempt went, with the seconds that it took: those documents are a run's own.
    """
    files = [path for part in ("index", "trees", "releases") for path in (store / part).rglob("*") if path.is_file()]
    made = [path for path in files if path.parent.name != "trees" or json.loads(path.read_text())["kind"] != ATTEMPT]
    return {str(path.relative_to(store)): path.stat().st_mtime_ns for path in made}
