"""Several processes hold a part each of the student and its teacher, and train as one process does.

They are started once for each number of processes, and train all cases one after the other, those that are killed
and others.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import decoders
import pytest
import torch
import wrappers
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.base.errors import Failure, InputError
from trimtab.components.distillation import work
from trimtab.components.distillation.objective import teacher
from trimtab.components.distillation.objective.teacher import StoredLogits
from trimtab.components.distillation.training import data_parallel, resume, sharding, training
from trimtab.components.pruning.work import prune
from trimtab.recipe import Distillation

from .ranks import Killed

RANKS = Path(__file__).with_name("ranks.py")
#: Six steps of twelve windows, which two processes divide, and three.
SETTINGS = {"tokens": 6 * 12 * 32, "batch_size": 12, "length": 32, "learning_rate": 0.001}
MOVEMENT = {"method": "movement", "sparsity": 0.5}
ROUNDED, FP8 = {"format": "int8_wo"}, {"format": "fp8"}


class Case(NamedTuple):
    """Settings of `distill`, what other sections want of the weights, and which models train."""

    settings: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    models: str = "pruned"
    #: How far losses may be apart, of themselves; more where a weight near a threshold falls on its other side.
    within: float = 1e-4


#: The Llama's head is its embedding; 64 channels and 300 tokens are not a multiple of three.
CASES = {
    "plain": Case(),
    "parts": Case({"gradient_accumulation": 2, "early_stopping": 3}),
    "recomputed": Case({"activation_checkpointing": True, "gradient_accumulation": 3}),
    "hidden": Case({"hidden_weight": 1.0, "loss": "reverse_kl", "label_weight": 0.2}),
    "stored": Case({"stored_logits": 8, "temperature": 2.0}),
    "zeros": Case({}, {"keep_zeros": True}, "sparse"),
    "rounded": Case({}, {"keep_zeros": True, "rounded": ROUNDED}, "sparse", 1e-2),
    "inputs": Case({"activation_checkpointing": True}, {"rounded": FP8, "rounded_inputs": True}, within=1e-2),
    "movement": Case({}, {"movement": MOVEMENT}, "whole", 1e-2),
    "gradual": Case({}, {"movement": MOVEMENT | {"scores": "magnitude"}}, "whole", 1e-2),
    "soft": Case({}, {"movement": {"method": "movement", "penalty": 100.0, "score_learning_rate": 1.0}}, "whole", 1e-2),
    "experts": Case({}, {}, "mixtral"),
    "untied": Case({"hidden_weight": 0.5}, {}, "qwen3"),
    "wrapper": Case({"activation_checkpointing": True}, {}, "gemma3"),
}
#: Those that three processes train too.
BY_THREE = ("plain", "zeros", "untied")


@pytest.fixture(scope="module")
def pairs(student, model, calibration, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Student and teacher by name."""
    folder = tmp_path_factory.mktemp("pairs")
    made = {"mixtral": decoders, "qwen3": decoders, "gemma3": wrappers}
    for name, maker in made.items():
        maker.write(folder / f"{name}-teacher", name)
        maker.write(folder / name, name, seed=1)
    (folder / "sparse").mkdir()
    parameters = {"method": "magnitude", "sparsity": 0.5}
    prune(str(model), str(calibration), str(folder / "sparse"), str(folder / "scratch"), parameters)
    own = {name: (folder / name, folder / f"{name}-teacher") for name in made}
    return {"pruned": (student, model), "sparse": (folder / "sparse", model), "whole": (model, model)} | own


@pytest.fixture(scope="module")
def logits(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("logits")
    parameters = {"text": ["builtin"], "length": 32, "temperature": 2.0, "stored_logits": 8}
    (folder / "made").mkdir()
    teacher.teach(str(model), str(folder / "made"), str(folder / "scratch"), parameters)
    return folder / "made"


@pytest.fixture(scope="module")
def job(pairs, logits, tmp_path_factory):
    """A function: what `ranks` takes, for a case; `scratch` is where a killed run left its checkpoints."""

    def make(case: Case, scratch: Path | None = None, ends_before: int | None = None) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("job")
        (folder / "output").mkdir()
        student, model = pairs[case.models]
        parameters = Distillation(**SETTINGS | case.settings).model_dump(mode="json") | {"weights": case.weights}
        arguments = {
            "checkpoint": str(student), "model": str(model), "output": str(folder / "output"),
            "scratch": str(scratch or folder / "scratch"), "parameters": parameters,
            "teacher_logits": str(logits) if "stored_logits" in case.settings else None,
        }  # fmt: skip
        return {"arguments": arguments, "answer": str(folder / "answer.json"), "ends_before": ends_before}

    return make


def together(rounds: dict[int, list[dict[str, Any]]], folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Trains jobs in so many processes, and returns the answers."""
    path = folder / "rounds.json"
    path.write_text(json.dumps(list(rounds.items())), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = {"capture_output": True, "text": True, "timeout": 500, "env": environment}
    done = subprocess.run([sys.executable, str(RANKS), str(path)], **run)
    assert done.returncode == 0, done.stderr[-8000:]
    return {
        processes: [json.loads(Path(job["answer"]).read_text(encoding="utf-8")) for job in jobs]
        for processes, jobs in rounds.items()
    }


def written(job: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The trained student's weights, and distillation.json."""
    output = Path(job["arguments"]["output"])
    return load_file(output / "model.safetensors"), json.loads((output / "distillation.json").read_text())


def alone(job: dict[str, Any]) -> dict[str, Any]:
    return work.train(**job["arguments"])


#: Those that are killed too, before their fifth step.
KILLED = ("parts", "movement")


@pytest.fixture(scope="module")
def killed_by_two(tmp_path_factory) -> dict[str, Path]:
    """Where the killed runs of two processes leave their checkpoints, once `shared_out` has run."""
    folder = tmp_path_factory.mktemp("killed-by-two")
    return {name: folder / name for name in KILLED}


@pytest.fixture(scope="module")
def shared_out(job, killed_by_two, tmp_path_factory):
    """All cases in two processes, and some in three: name and processes -> (job, answer)."""
    named = {processes: {name: job(CASES[name]) for name in names} for processes, names in ((2, CASES), (3, BY_THREE))}
    rounds = {processes: list(jobs.values()) for processes, jobs in named.items()}
    rounds[2] += [job(CASES[name], killed_by_two[name], ends_before=4) for name in KILLED]
    answers = together(rounds, tmp_path_factory.mktemp("shared-out"))
    return {
        (name, processes): pair
        for processes, jobs in named.items()
        for name, *pair in zip(jobs, jobs.values(), answers[processes], strict=False)
    }


@pytest.mark.parametrize(("name", "processes"), [*((name, 2) for name in CASES), *((name, 3) for name in BY_THREE)])
def test_several_processes_give_the_curve_of_one(name, processes, shared_out, job):
    case, (shared, answer) = CASES[name], shared_out[name, processes]
    one = job(case)
    metrics = alone(one)
    weights, told = written(one)
    weights_too, told_too = written(shared)
    assert told_too["train"] == pytest.approx(told["train"], rel=case.within, abs=1e-5)
    losses, losses_too = ([loss for _, loss in each["heldout"]] for each in (told, told_too))
    assert losses_too == pytest.approx(losses, rel=case.within, abs=1e-5)
    assert answer["metrics"].get("zeros", 0) == pytest.approx(metrics.get("zeros", 0), abs=case.within)
    assert list(weights) == list(weights_too)
    for key, tensor in weights.items():
        same = weights_too[key].dtype == tensor.dtype and weights_too[key].shape == tensor.shape
        apart, size = (weights_too[key].float() - tensor.float()).norm(), tensor.float().norm()
        assert same and apart <= 100 * case.within * size, key


def test_each_process_holds_its_part_of_the_states(shared_out, pairs):
    """A master and two moments of four bytes each; a row of each tensor more where they do not come out even."""
    parameters = sum(tensor.numel() for tensor in load_file(pairs["pruned"][0] / "model.safetensors").values())
    held = shared_out["plain", 2][1]["states"]
    assert held == [6 * parameters, 6 * parameters], "64 channels, 128 neurons and 300 tokens are even"
    held = shared_out["plain", 3][1]["states"]
    assert sum(held) == 12 * parameters and max(held) < 1.05 * 12 * parameters / 3


def test_zeros_stay_where_they_were(shared_out, pairs):
    before, (after, _) = load_file(pairs["sparse"][0] / "model.safetensors"), written(shared_out["zeros", 3][0])
    for name in (name for name in before if "_proj" in name):
        assert (after[name][before[name] == 0] == 0).all() and not torch.equal(after[name], before[name]), name


@pytest.fixture(scope="module")
def goes_on(job, shared_out, killed_by_two, tmp_path_factory):
    """Of each killed case what went on from its fifth step, in as many processes, in fewer and in more."""
    folder, step = tmp_path_factory.mktemp("killed"), training.Training.step
    assert [path.name for path in killed_by_two[KILLED[0]].glob("training-*")] == ["training-00000004"]
    fewer = {name: job(CASES[name], folder / f"{name}-fewer") for name in KILLED}
    for name in KILLED:
        shutil.copytree(killed_by_two[name], fewer[name]["arguments"]["scratch"])

    def killed(self: training.Training, number: int) -> torch.Tensor:
        if number == 4:
            raise Killed
        return step(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "step", killed)
        patch.setattr(resume, "TRAINING_OVER_SAVING", 0)
        for name in KILLED:
            with pytest.raises(Killed):
                alone(job(CASES[name], folder / f"{name}-more"))
    again = {name: job(CASES[name], killed_by_two[name]) for name in KILLED}
    more = {name: job(CASES[name], folder / f"{name}-more") for name in KILLED}
    together({2: [*again.values(), *more.values()]}, folder)
    resumed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.progress, "report", lambda stage, text, *counts: resumed.append(text))
        for name in KILLED:
            alone(fewer[name])
    assert resumed.count("resumed after step 4") == len(KILLED)
    return {name: (again[name], fewer[name], more[name]) for name in KILLED}


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_training_goes_on_in_any_number_of_processes(name, goes_on, shared_out):
    """Two end before the fifth step: two go on bit for bit, and one with the same curve. One ends: two go on."""
    (weights, told), (again, *others) = written(shared_out[name, 2][0]), goes_on[name]
    found, told_again = written(again)
    assert told_again == told and all(torch.equal(found[key], weights[key]) for key in weights)
    for other in others:
        told_too = written(other)[1]
        assert told_too["train"] == pytest.approx(told["train"], rel=CASES[name].within, abs=1e-5)
        assert told_too["heldout_loss_after"] == pytest.approx(told["heldout_loss_after"], rel=CASES[name].within)


def test_several_processes_leave_stored_logits_in_their_files(logits, model, monkeypatch):
    windows = teacher.data.read(work.checkpoints.load_tokenizer(model), ["builtin"], 32).all
    places = torch.tensor([70, 1, len(windows) - 1])
    expected = StoredLogits(logits, windows, torch.device("cpu")).rows(places, torch.device("cpu"))
    monkeypatch.setattr(data_parallel, "count", lambda: 2)
    monkeypatch.setattr(teacher, "load_file", None)
    found = StoredLogits(logits, windows, torch.device("cpu"))
    assert len(found._stored["rest"]) == len(list(logits.iterdir())) > 1
    assert all(torch.equal(a, b) for a, b in zip(found.rows(places, torch.device("cpu")), expected, strict=True))


def test_blocks_that_share_weights_are_not_shared_out():
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    network = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
    network.model.layers[1].mlp = network.model.layers[0].mlp
    with pytest.raises(Failure, match="LlamaForCausalLM shares weights between its blocks, so .*; write 1") as caught:
        sharding.shard(network, torch.device("cpu"))
    assert caught.value.failure_class == "unsupported"


def test_a_batch_that_the_processes_do_not_divide(job, monkeypatch):
    """As a TrainJob may start them, whose number the recipe does not know."""
    monkeypatch.setattr(data_parallel, "count", lambda: 5)
    with pytest.raises(InputError, match="distill.batch_size: 12 .* 5 processes do not divide; write a multiple of 5"):
        alone(job(CASES["plain"]))
