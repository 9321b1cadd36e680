"""The whole command on a tiny random Llama: everything is real but the size."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny

pytestmark = pytest.mark.slow

#: No training survives this learning rate, nor a tenth of it. INT4 of the ladder passes.
RECIPE = """
prune: {method: depth, blocks: 1}
distill: {tokens: 1024, batch_size: 4, length: 64, learning_rate: 1.0e+30}
quantize: {format: int4_awq, group_size: 32}
calibrate: {samples: 4, length: 64}
accept: {min_recovery: 0.8, max_perplexity_ratio: 1.5}
"""
EVALUATION = """
items: [300, 60, 60]
windows: [4, 4, 4]
confirm_items: 160
confirm_windows: 4
window_tokens: 64
"""
#: Every stage has work, enough that a kill hits it.
LONG_RECIPE = """
prune: {method: width, ffn: 0.5, kv_groups: 1}
distill: {tokens: 10240, batch_size: 4, length: 64}
quantize: {format: mixed, effective_bits: 6, group_size: 32}
calibrate: {samples: 4, length: 64}
accept: {min_recovery: 0.1, max_perplexity_ratio: 10}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its tasks."""
    folder = tmp_path_factory.mktemp("home")
    tiny.write_model(folder / "model", layers=2)
    tiny.write_tasks(folder / "tasks", folder / "model", items=580)
    return folder


class Command:
    """`trimtab run` in a folder of its own, with a cache of its own."""

    def __init__(self, home: Path, folder: Path, recipe: str, attempts: int):
        self.folder = folder
        (folder / "recipe.yaml").write_text(recipe)
        (folder / "evaluation.yaml").write_text(EVALUATION)
        self.command = [sys.executable, "-m", "trimtab.pipelines.commands.main", "run", "--model", str(home / "model")]
        self.command += ["--tasks", tiny.TASK, "--task-path", str(home / "tasks"), "--max-attempts", str(attempts)]
        self.command += ["--recipe", "recipe.yaml", "--evaluation", "evaluation.yaml", "--store", "store"]
        self.environment = {**os.environ, "TRIMTAB_CACHE": str(folder / "cache")}
        self.runs = 0

    def start(self) -> subprocess.Popen:
        self.runs += 1
        return subprocess.Popen(
            [*self.command, "--runs", f"runs-{self.runs}"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def events(self, run: int) -> list[dict]:
        paths = list((self.folder / f"runs-{run}").glob("*/events.jsonl"))
        lines = paths[0].read_text().splitlines(keepends=True) if paths else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def log(self, run: int) -> str:
        return "".join(path.read_text() for path in (self.folder / f"runs-{run}").glob("*/run.log"))[-3000:]


def check_store(store: Path) -> int:
    """Checks every file of every tree against its manifest; returns the number of trees."""
    manifests = list((store / "trees").glob("*.json"))
    for path in manifests:
        for name, blob in json.loads(path.read_text())["files"].items():
            data = (store / "blobs" / blob["sha256"][:2] / blob["sha256"]).read_bytes()
            assert len(data) == blob["bytes"] and hashlib.sha256(data).hexdigest() == blob["sha256"], (path, name)
    for path in (store / "index").glob("*.json"):
        digest = json.loads(path.read_text())["tree"]["digest"]
        assert (store / "trees" / f"{digest}.json").exists()
    return len(manifests)


@pytest.fixture(scope="module")
def finished(home, tmp_path_factory):
    """The command after it ran, with its exit code and outputs."""
    command = Command(home, tmp_path_factory.mktemp("finished"), RECIPE, attempts=3)
    process = command.start()
    out, err = process.communicate(timeout=900)
    return command, process.returncode, out, err


def test_released(finished):
    command, code, out, err = finished
    assert code == 0, err + command.log(1)
    (release,) = [line.split()[1] for line in out.splitlines() if line.startswith("release")]
    record = json.loads((command.folder / "store" / "releases" / "model" / "000001.json").read_text())
    assert release == f"{(command.folder / 'store').as_uri()}/releases/model/000001"
    assert record["recipe"]["quantize"]["format"].startswith("int4")
    assert record["verdict"]["outcome"] == "accepted" and record["verdict"]["confirmed"]
    assert check_store(command.folder / "store") > 10


def test_the_table_and_the_report(finished):
    command, _, out, _ = finished
    for text in ("unchanged (bf16)", "-1 blocks", "rejected", "accepted, confirmed", "baseline"):
        assert text in out
    (page,) = [Path(line.split()[1]) for line in out.splitlines() if line.startswith("report")]
    told = page.read_text()
    assert "<html" in told and "-1 blocks + distill 1,024 tokens + int4_awq" in told
    pages = [page.read_text() for page in sorted((command.folder / "runs-1").glob("*/*/validate*/report"))]
    calibrated = ["4 samples of 64 tokens, in which" in page for page in pages]
    assert calibrated == [False, True, True, False]  # the baseline and int4_rtn read no activations


def test_progress_is_shown_while_it_works(finished):
    _, _, _, err = finished
    for stage in ("fetch", "calibrate", "prune", "distill", "quantize", "engine", "validate", "attempt 3", "release"):
        assert f"  {stage}: " in err
    assert "Traceback" not in err


def test_the_attempts(finished):
    """The user's recipe first, then its remedy, then the ladder."""
    command, *_ = finished
    (outcome,) = (command.folder / "runs-1").glob("*/*/summarize/outcome")
    state = json.loads(outcome.read_text())
    attempts = [(brief["recipe"], brief["verdict"]) for brief in state["history"]]
    assert [verdict.get("failure_class", verdict["outcome"]) for _, verdict in attempts] == [
        "training_diverged", "training_diverged", "accepted",
    ]  # fmt: skip
    rates = [recipe["distill"]["learning_rate"] for recipe, _ in attempts[:2]]
    assert rates == pytest.approx([1e30, 1e29]) and "distill" not in attempts[2][0]
    assert "the distillation loss is nan at step " in attempts[0][1]["reason"]
    assert state["baseline"]["verdict"]["accuracy"]["estimate"] == pytest.approx(0.9, abs=0.02)  # as made: 9 of 10
    assert attempts[-1][1]["measurements"]["quantized_share"] < 0.35


def test_again_does_no_work(finished):
    command, _, first_out, _ = finished
    process = command.start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert not [event for event in command.events(2) if event["text"].startswith(("done in", "scoring"))]
    assert out.splitlines()[-1] == first_out.splitlines()[-1]  # the same release
    assert len(list((command.folder / "store" / "releases" / "model").iterdir())) == 1


#: Work that waits in blocks, a training, shards that are written, and what is begun anew; half of them with all that
#: the run had started. Each stage's own tests kill it in its other places.
KILLS = [
    ("calibrate", "measuring activations", "the command"),
    ("distill", "loss", "everything"),
    ("quantize", "quantizing shard", "everything"),
    ("validate", "scoring", "the command"),
]


def test_killed_and_started_again(home, tmp_path):
    command = Command(home, tmp_path, LONG_RECIPE, attempts=1)
    for stage, text, victim in KILLS:
        process = command.start()
        _wait_for(command, process, stage, text)
        (os.killpg if victim == "everything" else os.kill)(process.pid, signal.SIGKILL)
        process.communicate(timeout=60)
        if (tmp_path / "store" / "trees").exists():
            check_store(tmp_path / "store")
    process = command.start()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err + command.log(command.runs)
    assert "release  file://" in out
    check_store(tmp_path / "store")
    assert list((tmp_path / "store" / ".partial").iterdir()) == []
    assert list((tmp_path / "cache" / ".partial").iterdir()) == []
    # What was complete is not done again, and training goes on from its last checkpoint.
    events = [event for run in range(1, command.runs + 1) for event in command.events(run)]
    done = Counter(event["stage"] for event in events if event["text"].startswith("done in"))
    assert all(count <= (2 if stage == "engine" else 1) for stage, count in done.items()), done
    assert any(event["text"].startswith("resumed after step") for event in events)


def _wait_for(command: Command, process: subprocess.Popen, stage: str, text: str) -> None:
    """Waits until the run is in the middle of a stage of its attempt."""
    end = time.monotonic() + 300
    while time.monotonic() < end and process.poll() is None:
        events = command.events(command.runs)
        tried = [n for n, event in enumerate(events) if event["stage"].startswith("attempt")]
        for event in events[tried[0] :] if tried else []:
            enough = event["done"] >= 25 if stage == "distill" else True
            if event["stage"] == stage and event["text"].startswith(text) and enough:
                return
        time.sleep(0.05)
    out, err = process.communicate(timeout=60)
    raise AssertionError(f"never in {stage}: exit code {process.returncode}\n{out}{err}{command.log(command.runs)}")
