"""Two processes take the steps of one, and the command that a TrainJob runs on several nodes does the stage's work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from seaweed import free_ports

from trimtab.base.errors import InputError
from trimtab.components import distillation
from trimtab.components.distillation import __main__ as command
from trimtab.components.distillation.training import data_parallel

from .conftest import SETTINGS

FOLDER = distillation.__path__[0]


def test_two_processes_give_the_curve_of_one(distill, tmp_path):
    """A stage that starts torchrun, against one that trains by itself: with gradients in parts, too."""
    alone, _, told = distill("alone")
    before = signal.getsignal(signal.SIGTERM)
    both, weights, told_both = distill("both", processes=2, gradient_accumulation=2)
    assert told_both["train"] == pytest.approx(told["train"], rel=1e-4)
    assert [loss for _, loss in told_both["heldout"]] == pytest.approx([loss for _, loss in told["heldout"]], rel=1e-4)
    assert both["steps"] == alone["steps"] == 6 and not (tmp_path / "scratch").exists()
    assert signal.getsignal(signal.SIGTERM) == before, "torchrun left its own"


def test_processes_take_turns_with_rows(monkeypatch):
    monkeypatch.setattr(data_parallel, "count", lambda: 2)
    monkeypatch.setattr(data_parallel, "rank", lambda: 1)
    assert data_parallel.share(torch.arange(6)).tolist() == [1, 3, 5]


def test_fewer_gpus_than_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="distill.processes: 2, and there are 1 GPUs; write at most 1"):
        data_parallel.launch(2, [])


def test_the_command(student, model, tmp_path, capsys):
    folders = {"student": student, "teacher": model, "output": tmp_path / "out", "scratch": tmp_path / "scratch"}
    arguments = [part for name, value in folders.items() for part in (f"--{name}", str(value))]
    assert command.main([*arguments, "--recipe", json.dumps(SETTINGS)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 6
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert command.main([*arguments, "--recipe", "{tokens: 9, los: kl}"]) == InputError.exit_code
    assert "los: unknown key 'los'; write 'loss'" in capsys.readouterr().err


def trainjob():
    with open(f"{FOLDER}/trainjob.yaml", encoding="utf-8") as file:
        return yaml.safe_load(file)


def test_the_manifest_has_the_shape_of_a_trainjob():
    """The fields of trainer.kubeflow.org/v1alpha1 that it uses; no cluster has taken it."""
    job = trainjob()
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed", "kind": "ClusterTrainingRuntime",
                                         "apiGroup": "trainer.kubeflow.org"}  # fmt: skip
    trainer = job["spec"]["trainer"]
    assert set(trainer) <= {"image", "command", "args", "env", "numNodes", "numProcPerNode", "resourcesPerNode"}
    assert trainer["numNodes"] > 1 and trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]


def test_the_manifest_runs_the_command(student, model, tmp_path):
    """What it runs, on two nodes of one process each, with the environment that the runtime sets for torchrun."""
    trainer = trainjob()["spec"]["trainer"]
    folders = {"student": student, "teacher": model, "output": tmp_path / "out", "scratch": tmp_path / "scratch"}
    arguments = list(trainer["command"][1:]) + list(trainer["args"])
    for name, value in folders.items():
        arguments[arguments.index(f"--{name}") + 1] = str(value)
    arguments[arguments.index("--recipe") + 1] = json.dumps(SETTINGS)
    assert trainer["command"][0] == "torchrun"
    (port,) = free_ports(1)
    nodes = []
    for rank in range(2):
        node = {"PET_NNODES": "2", "PET_NODE_RANK": str(rank), "PET_NPROC_PER_NODE": "1",
                "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}  # fmt: skip
        run = [sys.executable, "-m", "torch.distributed.run", *arguments]
        nodes.append(subprocess.Popen(run, env=os.environ | node, stdout=subprocess.PIPE, text=True))
    outputs = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    told = [output.splitlines()[-1] for output in outputs if output.strip()]
    assert len(told) == 1 and json.loads(told[0])["steps"] == 6, "the first process alone tells"
    assert (tmp_path / "out" / "model.safetensors").exists()
