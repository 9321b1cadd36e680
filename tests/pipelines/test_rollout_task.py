"""The rollout in a run: the tasks behind the gate, by kfp.local, with a store in S3 and a stand-in for Kubernetes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from kfp import dsl, local
from registry_server import RegistryServer
from releases import Released

from trimtab.base import progress, signing
from trimtab.base.errors import InputError, NotVerified
from trimtab.components.deployment.rollout import delivery
from trimtab.components.deployment.rollout.settings import Rollout
from trimtab.loop import status
from trimtab.pipelines.loop import Loop
from trimtab.pipelines.tasks import forked
from trimtab.store import open_store

RUN = "0b0c4b6e-3b7d-4c57-9d55-6f2b7c1d8a90"
ROLLOUT = """
service: assistant
namespace: serving
image: registry/vllm:1
command: [vllm, serve, "{model}"]
loader: registry/trimtab:1
prompts: [one, "it's two"]
"""

#: What only a cluster has.
pytestmark = pytest.mark.filterwarnings("ignore:Task .* have no effect in the current local runner")


@pytest.fixture
def released(s3_server, tmp_path, monkeypatch) -> Released:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(progress.ENVIRONMENT, raising=False)
    store = open_store(f"s3://{s3_server.bucket}/{tmp_path.name}")
    return Released(store, tmp_path)


LOOP = Loop(1)


@dsl.pipeline(name="behind-the-gate")
def behind_the_gate(release: str, rollout: str = "", registry: str = ""):
    LOOP.deliver(release, rollout, registry)


def run(folder: Path, **arguments: str) -> tuple[dict[str, Path], dict[str, str]]:
    """Runs the tasks, whatever their end; returns the folders of those that ran, and what the rollout returned."""
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(folder), raise_on_error=False)
    with forked():
        behind_the_gate(**arguments)
    tasks = {path.name: path for path in folder.glob("behind-the-gate-*/*")}
    output = tasks["roll-out"] / "executor_output.json"
    return tasks, json.loads(output.read_text())["parameterValues"] if output.exists() else {}


def test_a_run_that_asks_for_no_rollout(tmp_path):
    tasks, said = run(tmp_path, release="/store/releases/tiny/000001")
    assert list(tasks) == ["roll-out"] and said["Output"] == "not_asked"
    assert "served nowhere: the run has no `rollout`" in (tasks["roll-out"] / "story").read_text()


def test_a_run_enters_its_release_in_a_registry_without_serving_it(tmp_path, monkeypatch):
    pytest.importorskip("model_registry")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    made, server = Released(open_store(str(tmp_path / "store")), tmp_path), RegistryServer()
    try:
        for folder, told in (("first", "is entered"), ("again", "stands already")):
            tasks, said = run(tmp_path / folder, release=made.uri, registry=server.host)
            assert list(tasks) == ["roll-out"] and said["Output"] == "not_asked"
            page = (tasks["roll-out"] / "story").read_text()
            assert f"tiny 000001 {told} in the Model Registry at {server.host}" in page
        assert [model["name"] for model in server.kept["registered_models"]] == ["tiny"]
        assert server.kept["artifacts"][0]["uri"] == made.uri
        server.refuse = 403
        tasks, said = run(tmp_path / "refused", release=made.uri, registry=server.host)
        assert list(tasks) == ["roll-out"] and not said, "the task fails, and doing it again is safe"
    finally:
        server.close()


def test_a_registry_is_checked_before_a_run_begins(monkeypatch):
    pytest.importorskip("model_registry")
    delivery.foresee("", "/store", "http://registry:8080")
    monkeypatch.delenv("TRIMTAB_REGISTRY_TOKEN", raising=False)
    for address, message in (("registry:8080", "is not valid"), ("https://registry", "wants a token; set TRIMTAB_REG")):
        with pytest.raises(InputError, match=message):
            delivery.foresee("", "/store", address)


@pytest.mark.slow
def test_a_run_that_serves_its_release_and_one_that_rolls_back(released, kubernetes, tmp_path, capfd):
    tasks, said = run(tmp_path / "first", release=released.uri, rollout=ROLLOUT)
    digest = released.evidence["export"]["digest"]
    assert list(tasks) == ["roll-out"] and kubernetes.serving() == {digest: 100}
    assert said == {"Output": "serves", "told": f"assistant serves {digest[:12]}"}
    story = (tasks["roll-out"] / "story").read_text()
    assert story.startswith(f"# {said['told']}\n") and "- assistant: applied as the first version" in story

    kubernetes.service = None
    kubernetes.answers = {digest: None}
    tasks, said = run(tmp_path / "second", release=released.uri, rollout=ROLLOUT)
    why = f"{released.uri} does not serve: assistant: the new version leaves 2 of 2 prompts without an answer"
    assert said["Output"] == "rolled_back"
    assert said["told"].startswith(f"{why}; deleted, it had no version before (the release stays: `trimtab deploy` ")
    assert kubernetes.service is None and open_store(released.store.uri).newest("tiny") == released.uri
    assert (tasks["roll-out"] / "story").read_text().startswith(f"# {why}")
    printed = capfd.readouterr()
    assert f"trimtab.base.errors.NotReleased: {why}" in printed.err + printed.out


class Page:
    """Artifacts of a task, in a folder; `figures` are the metrics."""

    def __init__(self, folder: Path):
        self.figures: dict[str, float] = {}
        self.story = SimpleNamespace(path=str(folder / "story.md"))
        self.metrics = SimpleNamespace(log_metric=self.figures.__setitem__)

    def run(self, release: str, rollout: str) -> tuple[str, str]:
        return delivery.run(release, rollout, RUN, self.story, self.metrics)

    @property
    def text(self) -> str:
        return Path(self.story.path).read_text()


def test_approved_by_a_person(released, kubernetes, tmp_path):
    """The command stands on the task's page and where `trimtab watch` reads it, with the comparison's figures."""
    digest = released.evidence["export"]["digest"][:12]
    kubernetes.people = [lambda entries: entries.update(assistant=f"approved {digest} by her")]
    page = Page(tmp_path)
    key = (tmp_path / "gate.pub").read_text()
    settings = Rollout.parse(ROLLOUT).model_copy(update={"approval_minutes": 1.0, "keys": (key,)})
    assert page.run(released.uri, settings.to_json())[0] == "serves"
    command = "kubectl -n serving patch configmap trimtab-approvals --type merge -p "
    assert f"      {command}" in page.text and "- assistant: approved by her" in page.text
    lines = status.rollout(released.store, RUN)
    assert lines[0] == "assistant: applied as the first version" and lines[-1] == f"assistant serves {digest}"
    assert any(line.startswith(f"waits up to 1 minutes for approval: {command}") for line in lines)
    assert page.figures["prompts"] == 2 and page.figures["unanswered"] == 0


def test_refused_by_a_person(released, kubernetes, tmp_path):
    digest = released.evidence["export"]["digest"][:12]
    kubernetes.people = [lambda entries: entries.update(assistant=f"refused {digest} by her")]
    page = Page(tmp_path)
    end, told = page.run(released.uri, ROLLOUT + "approval_minutes: 1")
    assert end == "rolled_back" and f"assistant: {digest} was refused by her; deleted" in told
    assert page.text.startswith(f"# {told}\n")


def test_another_key(released, kubernetes, tmp_path):
    other, _ = signing.generate(tmp_path / "other")
    settings = Rollout.parse(ROLLOUT).model_copy(update={"keys": (other.read_text(),)})
    with pytest.raises(NotVerified, match="is refused"):
        Page(tmp_path).run(released.uri, settings.to_json())
    assert kubernetes.service is None


@pytest.mark.parametrize(
    ("release", "rollout", "message"),
    [
        ("/store/releases/tiny/000001", ROLLOUT, "its pods cannot read the store '/store'; write store: s3://"),
        ("s3://b/p/releases/tiny/000001", "service: A", "service: 'A' String should match pattern"),
        ("s3://b/p/releases/tiny/000001", ROLLOUT + "keys: [gate.pub]", "is not a list of public keys in PEM; write"),
    ],
)
def test_bad_input(release, rollout, message, tmp_path):
    with pytest.raises(InputError) as raised:
        Page(tmp_path).run(release, rollout)
    assert message in str(raised.value)


def test_a_rollout_that_the_cluster_cannot_take_is_refused_before_the_work(kubernetes):
    """By the first task of a run: the last one would find out when the GPUs are paid for."""
    delivery.foresee("", "/store")
    delivery.foresee(ROLLOUT, "s3://b/p")
    kubernetes.faults = [("GET", 404, "404 page not found")]
    with pytest.raises(InputError, match="does not know InferenceServices; install KServe"):
        delivery.foresee(ROLLOUT, "s3://b/p")
    kubernetes.approvals = None
    with pytest.raises(InputError, match="has no ConfigMap 'trimtab-approvals'"):
        delivery.foresee(ROLLOUT + "approval_minutes: 60", "s3://b/p")
    assert kubernetes.applied == []
