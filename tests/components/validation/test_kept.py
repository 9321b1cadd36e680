"""How often an attempt loads a model: validation keeps its engines open from the integrity gate to the confirmation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trimtab.components.engine import work
from trimtab.components.validation.evaluation import measure
from trimtab.components.validation.evaluation.measure import compare_speed, evaluate
from trimtab.components.validation.integrity.gate import inspect
from trimtab.recipe import Engine
from trimtab.runtime.checkpoint.model_files import weight_file_bytes
from trimtab.runtime.engines import kept, torch_engine

LIMITS = {"max_seq_len": 128, "max_batch_size": 2}
LOOK = {
    "tasks": [], "task_path": "", "filters": {}, "items": {}, "all_windows": 8, "window_tokens": 32, "max_length": 64,
    "heldout": "builtin", "speed": False,
}  # fmt: skip


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The folders that models are loaded from, one by one."""
    found: list[str] = []
    assemble = torch_engine.assemble
    monkeypatch.setattr(torch_engine, "assemble", lambda *a: (found.append(str(a[0])), assemble(*a))[1])
    monkeypatch.setattr(measure, "SPEED", {"prompt_tokens": 4, "new_tokens": 2, "repeats": 1})
    kept.close()
    yield found
    kept.close()


@pytest.fixture
def attempt(export: Callable[..., Path], model: Path, tmp_path: Path) -> Callable[[], list[float]]:
    """A function that measures what validation measures of an attempt, in a session's process; returns the windows."""
    folders = {"candidate": export("int8_wo"), "baseline": model}
    for name, folder in folders.items():
        (tmp_path / name).mkdir()
        work.build(str(folder), str(tmp_path / name), "", LIMITS)

    def look(who: str, number: int) -> float:
        output = tmp_path / f"{who}-{number}"
        output.mkdir()
        parameters = {**LOOK, "windows": [2 * number, 2 * number + 2], "speed": number == 0}
        return evaluate(str(tmp_path / who), str(folders[who]), str(output), "", parameters)["log_perplexity"]

    def measure_all() -> list[float]:
        output = str(tmp_path)
        inspect(str(folders["candidate"]), str(model), output, "", {"format": "int8_wo", "group_size": 32})
        looks = [look(who, number) for number in range(3) for who in folders]
        places = [str(path) for who, folder in folders.items() for path in (tmp_path / who, folder)]
        compare_speed(*places, output, "", {"rounds": 2})
        return looks + [look(who, 3) for who in folders]

    return measure_all


def test_an_attempt_loads_each_model_once(attempt, loads, export, model):
    loads.clear()  # building an engine has loaded it once to see that it serves: three loads in all
    attempt()
    assert loads == [str(export("int8_wo")), str(model)]


def test_the_answers_are_those_of_engines_opened_anew(attempt, loads, monkeypatch, tmp_path):
    found = attempt()
    kept.close()
    for folder in (*tmp_path.glob("candidate-*"), *tmp_path.glob("baseline-*")):
        folder.rename(f"{folder}-kept")
    monkeypatch.setattr(kept, "SHARE", 0)
    loads.clear()
    assert attempt() == found
    assert len(loads) == 8  # of eleven questions three found open what they asked


def test_two_stay_while_they_take_half_of_the_memory(loads, export, model, monkeypatch):
    int8 = export("int8_wo")
    for missing, again in ((0, []), (1, [str(int8)])):
        kept.close()
        both = kept.loaded(int8, Engine()).weight_bytes + weight_file_bytes(model)
        monkeypatch.setattr(kept, "machine_memory", lambda memory=2 * both - missing: memory)
        kept.loaded(model, Engine())
        loads.clear()
        kept.loaded(int8, Engine())
        assert loads == again or torch.cuda.is_available()


def test_limits_are_those_of_who_asks(loads, model):
    first = kept.loaded(model, Engine(max_seq_len=16))
    second = kept.loaded(model, Engine(max_seq_len=32))
    assert len(loads) == 1 and second.model is first.model
    assert (first.settings.max_seq_len, second.settings.max_seq_len) == (16, 32)
