"""What tests of stages share: a state to begin with, and work that is not done."""

from __future__ import annotations

import importlib
import json

import pytest
from attempts import put
from facts import SMOLLM2

from trimtab.base import child, environment
from trimtab.loop.state import State
from trimtab.recipe import Recipe
from trimtab.stages import STAGES


@pytest.fixture
def state(store, tmp_path):
    """A function: a state with a recipe on a target."""

    def make(recipe: str, target: str = "h100") -> State:
        return State(
            store=store.uri, goal="lower_latency", target=target, model=put(store, tmp_path, "model"),
            recipe=Recipe.parse(recipe), attempt=1,
            libraries=dict.fromkeys(STAGES, environment.versions()),
        )  # fmt: skip

    return make


@pytest.fixture
def facts_known(monkeypatch):
    """The model of every state is SmolLM2-135M."""
    module = importlib.import_module("trimtab.stages.accelerators")
    monkeypatch.setattr(module, "facts_of", lambda *_: SMOLLM2)


@pytest.fixture
def worked(monkeypatch):
    """Replaces the child process: every work writes its name, and the calls are kept."""
    calls = []

    def call(work, *, output, scratch, parameters, **inputs):
        calls.append(work.rpartition(":")[2])
        with open(f"{output}/made", "w") as file:
            json.dump([work, parameters], file)
        return child.Done({"loss": 1.5}, 2.0, 1000)

    monkeypatch.setattr(child, "call", call)
    return calls
