"""An attempt whose pods a namespace would never start ends before one is asked for, with what to have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes_server import KubernetesServer

from trimtab.base.transient import POD
from trimtab.loop.documents import load, save
from trimtab.loop.state import State
from trimtab.pipelines import decisions
from trimtab.pipelines.cluster import capacity
from trimtab.pipelines.placement import machines
from trimtab.recipe import Recipe
from trimtab.stages.profile import Profile
from trimtab.store import open_store

PROFILE = """
stage: {memory: 16Gi, cpu: "4"}
stages: {quantize: {memory: 64Gi}, validate: {cpu: "16"}}
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesServer]:
    """What a pod finds: a namespace, and an API that the account of the run may ask."""
    found = KubernetesServer()
    (tmp_path / "namespace").write_text("team-a")
    monkeypatch.setattr(capacity, "NAMESPACE", tmp_path / "namespace")
    monkeypatch.setenv(POD, "10.0.0.1")

    def connect(client_configuration: Any) -> None:
        client_configuration.host = found.host

    monkeypatch.setattr(capacity.config, "load_incluster_config", connect)
    yield found
    found.close()


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[State, Any]]:
    """A function: what the task `prepare` returns for a recipe; its state, and all that it says."""
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/file").write_text("a model")
    model = store.put(tmp_path / "model", kind="checkpoint")
    monkeypatch.setattr("trimtab.loop.decisions.prepare", lambda state: state)  # the model is none to look into

    def run(recipe: str = "quantize: {format: int8_wo}", target: str = "h100") -> tuple[State, Any]:
        asked = {"goal": "lower_cost", "target": target, "model": model, "recipe": Recipe.parse(recipe), "attempt": 1}
        artifact = type("Artifact", (), {"path": str(tmp_path / "artifact"), "metadata": {}})()
        offered = machines(Profile.parse(PROFILE))
        said = decisions.prepare.python_func(save(State(store=store.uri, **asked)), offered, artifact)
        return load(said.state), said

    return run


def quota(**hard: str) -> dict[str, list[Any]]:
    """A ResourceQuota; `gpu` is NVIDIA's."""
    hard = {name.replace("gpu", "requests.nvidia.com/gpu").replace("_", "."): most for name, most in hard.items()}
    return {"resourcequotas": [{"metadata": {"name": "team"}, "spec": {"hard": hard}}]}


def most(kind: str, **limit: str) -> dict[str, list[Any]]:
    return {"limitranges": [{"metadata": {"name": "team"}, "spec": {"limits": [{"type": kind, "max": limit}]}}]}


TOO_MUCH = [
    (quota(requests_memory="63Gi"), "quantize asks for 64Gi of memory, and ResourceQuota 'team' of namespace 'team-a' "
     "allows 63Gi; have that raised, or write less into the profile"),
    (quota(limits_memory="32Gi"), "quantize asks for 64Gi of memory"),
    (quota(cpu="15"), "validate asks for 16 of cpu, and ResourceQuota 'team' of namespace 'team-a' allows 15"),
    (quota(gpu="0"), "quantize asks for 1 of nvidia.com/gpu, and ResourceQuota 'team' of namespace 'team-a' allows 0; "
     "have that raised, or write a smaller engine.tensor_parallel_size"),
    (most("Container", memory="48Gi"), "quantize asks for 64Gi of memory, and LimitRange 'team' of namespace 'team-a'"),
]  # fmt: skip


@pytest.mark.parametrize(("limits", "message"), TOO_MUCH)
def test_more_than_a_namespace_ever_allows(limits, message, cluster, prepare):
    """As data: the next recipe may need less. No task of this attempt asks for anything any more."""
    cluster.limits = limits
    state, said = prepare()
    assert state.verdict.failure_class == "does_not_fit" and message in state.verdict.reason
    assert said.quantize == said.validate == "0" and said.quantize_memory == "1Gi" and said.quantize_nodes == {}


ENOUGH = [
    {}, quota(requests_memory="64Gi", cpu="16", gpu="1"), quota(pods="1", services="0"),
    most("Container", memory="65536Mi", cpu="16000m"), most("PersistentVolumeClaim", storage="1Gi", memory="1Gi"),
    {"resourcequotas": [{"metadata": {"name": "a"}, "spec": {"hard": {"memory": "1Gi"}, "scopes": ["BestEffort"]}}]},
]  # fmt: skip


@pytest.mark.parametrize("limits", ENOUGH)
def test_what_it_allows_or_says_of_other_things(limits, cluster, prepare):
    cluster.limits = limits
    state, said = prepare()
    assert state.verdict is None and said.quantize == "1" and said.quantize_memory == "64Gi"


def test_what_an_attempt_does_not_ask_for_is_not_compared(cluster, prepare):
    cluster.limits = quota(requests_memory="32Gi")
    assert prepare("prune: {method: magnitude, sparsity: 0.5}")[0].verdict is None


def test_quotas_that_may_not_be_read_refuse_nothing(cluster, prepare, capsys):
    cluster.limits = None
    assert prepare()[0].verdict is None
    assert "quotas of the namespace are not known (Forbidden)" in capsys.readouterr().err


def test_outside_a_pod_nothing_is_asked(cluster, prepare, monkeypatch):
    monkeypatch.delenv(POD)
    cluster.limits = quota(gpu="0")
    assert prepare()[0].verdict is None
