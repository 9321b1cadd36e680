"""A release to a cluster, over HTTP to a stand-in for Kubernetes and KServe: promoted, or rolled back by itself."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from kubernetes_server import status

from trimtab.base.errors import InputError, NotReleased, StageError
from trimtab.components.deployment.rollout import canary as rollouts
from trimtab.components.deployment.rollout.canary import difference, roll_out
from trimtab.components.deployment.rollout.cluster import Cluster
from trimtab.components.deployment.rollout.comparison import Answer, percentile, refusal
from trimtab.components.deployment.rollout.delivery import unwinding
from trimtab.components.deployment.rollout.settings import ARTIFACT, Rollout, inference_service

OLD, NEW = "a" * 64, "b" * 64
STORE = "s3://bucket/store"
ROLLOUT = Rollout.parse(
    """
    service: assistant
    namespace: serving
    image: registry/vllm:1
    command: [vllm, serve, "{model}", --served-model-name, "{name}"]
    loader: registry/trimtab:1
    secrets: {trimtab-s3: {access_key: AWS_ACCESS_KEY_ID}}
    prompts: [one, two, three, four]
    ready_minutes: 0.02
    """
)


@pytest.fixture
def go(cluster: Cluster):
    """A function: rolls an artifact out, looking often."""

    def rolled(digest: str, force: bool = False, **changes: Any) -> str:
        return roll_out(cluster, ROLLOUT.model_copy(update=changes), STORE, digest, force, poll=0.02)

    return rolled


def test_the_first_version_and_its_successor(server, go):
    assert go(OLD) == f"assistant serves {OLD[:12]}" and server.serving() == {OLD: 100}
    assert go(NEW) == f"assistant serves {NEW[:12]}" and server.serving() == {NEW: 100}
    shares = [service["spec"]["predictor"].get("canaryTrafficPercent") for service in server.applied]
    assert shares == [None, 10, None]
    assert server.asked.count(OLD) == 4 + 4 and server.asked.count(NEW) == 4
    assert go(NEW) == "assistant serves this release already" and len(server.applied) == 3


WRONG = [
    ({"answers": {NEW: "another"}}, {}, "the versions disagree on 100% of 4 prompts, more than 25%"),
    ({"answers": {NEW: None}}, {}, "the new version leaves 4 of 4 prompts without an answer"),
    ({"answers": {NEW: " "}}, {}, "the new version answers with empty texts only"),
    ({"delays": {NEW: 0.1}}, {"max_latency_seconds": 0.05}, "at the 95th percentile, more than 0.05 s"),
    ({"slow": None}, {}, "the new version of assistant is not ready within 0.02 minutes"),
    ({}, {"approval_minutes": 0.01}, "the new version of assistant was not approved within 0.01 minutes"),
]


@pytest.mark.parametrize(("behaviour", "changes", "reason"), WRONG)
def test_a_failed_rollout_leaves_the_old_version_serving(behaviour, changes, reason, server, go):
    go(OLD)
    (revision,) = server.revisions
    for name, value in behaviour.items():
        setattr(server, name, value)
    with pytest.raises(NotReleased) as raised:
        go(NEW, **changes)
    assert reason in str(raised.value) and str(raised.value).endswith(f"; rolled back, {revision} serves")
    server.slow = 0
    server.answer("GET", "/", {}, None, {})  # the controller sees the last change
    assert server.serving() == {OLD: 100}
    server.answers, server.delays = {}, {}
    go(NEW)  # and the next one is not in its way
    assert server.serving() == {NEW: 100}


def test_a_first_version_that_fails_is_taken_away(server, go):
    server.answers = {NEW: None}
    with pytest.raises(NotReleased):
        go(NEW)
    assert server.service is None


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, RuntimeError])
def test_whatever_happens_it_is_rolled_back(trouble, server, go, monkeypatch):
    go(OLD)

    def broken(*arguments: Any) -> None:
        raise trouble

    monkeypatch.setattr(rollouts.comparison, "ask", broken)
    with pytest.raises(trouble):
        go(NEW)
    assert server.applied[-1]["spec"]["predictor"]["canaryTrafficPercent"] == 0


def test_a_pod_that_is_ended_rolls_back(server, go):
    go(OLD)
    before = signal.getsignal(signal.SIGTERM)
    server.people = [lambda _: os.kill(os.getpid(), signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), unwinding():
        go(NEW, approval_minutes=1)
    assert server.applied[-1]["spec"]["predictor"]["canaryTrafficPercent"] == 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_killed_rollout_is_taken_up(server, go, cluster):
    go(OLD)
    cluster.apply(inference_service(ROLLOUT, STORE, NEW, canary=True))  # and then the process was killed
    with pytest.raises(InputError, match=r"a rollout to 'assistant' is under way \(bbbbbbbbbbbb, 10 %\); wait"):
        go("c" * 64)
    go(NEW)
    assert server.serving() == {NEW: 100}


def test_other_settings_are_rolled_out_too(server, go):
    go(OLD)
    assert "already" in go(OLD) and "already" not in go(OLD, image="registry/vllm:2")
    assert server.service["spec"]["predictor"]["containers"][0]["image"] == "registry/vllm:2"


def test_a_revision_that_was_rolled_back_is_not_taken_for_the_next(server, go):
    """The status shows the last revision until KServe has seen the change."""
    go(OLD)
    server.answers = {NEW: None}
    with pytest.raises(NotReleased):
        go(NEW)
    server.slow = 0
    server.answer("GET", "/", {}, None, {})  # the status is of that now
    server.slow, server.asked = 4, []
    go("c" * 64, ready_minutes=1)
    assert NEW not in server.asked and server.serving() == {"c" * 64: 100}
    go(OLD, ready_minutes=1)  # and what served once can serve again
    assert server.serving() == {OLD: 100}


def test_slow_readiness(server, go):
    server.slow = 6
    go(OLD, ready_minutes=1)
    assert server.serving() == {OLD: 100}


def test_a_rollback_that_fails_says_so(server, go):
    go(OLD)
    server.answers = {NEW: None}
    answer = server.answer

    def away(method: str, path: str, *rest: Any) -> tuple[int, Any]:
        return (503, "busy") if NEW in server.asked else answer(method, path, *rest)

    server.answer = away
    with pytest.raises(StageError) as raised:
        go(NEW)
    said = str(raised.value)
    assert "leaves 4 of 4 prompts without an answer; and it could not be rolled back (" in said
    assert "the cluster answered 503" in said and said.endswith("until the same rollout is run again")


def test_a_service_that_someone_deletes_stays_deleted(server, go):
    go(OLD)
    answer = server.answer

    def deleted(method: str, path: str, *rest: Any) -> tuple[int, Any]:
        if server.serving().get(NEW):
            server.service = None
        return answer(method, path, *rest)

    server.answer = deleted
    with pytest.raises(StageError, match="was deleted"):
        go(NEW, approval_minutes=1)
    assert server.service is None


def test_conflicts(server, go):
    go(OLD)
    server.owned_by_others = True
    with pytest.raises(InputError) as raised:
        go(NEW)
    assert 'someone else owns a field (conflict with "argocd"' in str(raised.value)
    assert "write --force" in str(raised.value)
    assert len(server.applied) == 1 and server.serving() == {OLD: 100}
    go(NEW, force=True)
    assert server.serving() == {NEW: 100}


REFUSED = [
    ((403, status(403, "Forbidden", "may not patch")[1]), InputError, "you may not; apply manifests/release"),
    ((401, status(401, "Unauthorized", "")[1]), InputError, "does not know who you are; log in again"),
    ((404, "404 page not found"), InputError, "the cluster does not know InferenceServices; install KServe"),
    (
        status(404, "NotFound", "namespace", kind="namespaces"),
        InputError,
        "there is no such namespace; create it or write another",
    ),
    ((422, status(422, "Invalid", "spec.predictor: no")[1]), InputError, "the cluster refuses it (spec.predictor: no)"),
]


@pytest.mark.parametrize(("answer", "kind", "message"), REFUSED)
def test_refusals(answer, kind, message, server, cluster):
    server.faults = [("PATCH", *answer)]
    with pytest.raises(kind) as raised:
        cluster.apply(inference_service(ROLLOUT, STORE, NEW, canary=False))
    assert message in str(raised.value)


def test_the_api_is_away_for_a_moment(server, go):
    server.faults = [("GET", 503, "busy"), ("PATCH", 500, "busy"), ("GET", 429, "busy")]
    go(OLD)
    assert server.serving() == {OLD: 100} and server.faults == []


def test_the_api_stays_away(server, cluster):
    server.faults = [("GET", 503, "busy")] * 99
    with pytest.raises(StageError, match="the cluster answered 503"):
        cluster.read("assistant")


def test_without_canaries_nothing_is_touched(server, go):
    """KServe without Knative names no revisions: to apply there would replace what serves."""
    go(OLD)
    server.service["status"]["components"]["predictor"] = {}
    server.slow = None
    with pytest.raises(InputError, match="has no version that a canary could stand beside"):
        go(NEW)
    assert len(server.applied) == 1


def test_a_dry_run_shows_the_difference_and_changes_nothing(server, go, cluster):
    shown = difference(cluster, ROLLOUT, STORE, OLD)
    assert "+  name: assistant" in shown and "canaryTrafficPercent" not in shown and server.service is None
    go(OLD)
    shown = difference(cluster, ROLLOUT, STORE, NEW)
    assert f"-    {ARTIFACT}: {OLD}" in shown and f"+    {ARTIFACT}: {NEW}" in shown
    assert "+    canaryTrafficPercent: 10" in shown and "generation" not in shown
    assert len(server.applied) == 1


def test_the_service():
    service = inference_service(ROLLOUT, STORE, NEW, canary=True)
    predictor = service["spec"]["predictor"]
    (loader,), (container,) = predictor["initContainers"], predictor["containers"]
    assert loader["command"] == ["trimtab", "artifact", "export", NEW, "/models/artifact", "--store", STORE]
    assert loader["env"][0]["valueFrom"] == {"secretKeyRef": {"name": "trimtab-s3", "key": "access_key"}}
    assert container["command"] == ["vllm", "serve", "/models/artifact/files", "--served-model-name", "assistant"]
    for part in (loader, container):
        assert {"cpu", "memory"} <= set(part["resources"]["limits"])
        assert part["securityContext"]["runAsNonRoot"] and not part["securityContext"]["allowPrivilegeEscalation"]


BAD = [
    ("{}", "service: is required"),
    ("{canary_percent: 100}", "canary_percent: 100 should be less than or equal to 99"),
    ("{resources: {cpu: '1'}}", "has no memory; write such as memory: 16Gi"),
    ("{image: registry/vllm:latest}", "has no tag that stays"),
    ("{max_latency: 1}", "max_latency: unknown key 'max_latency'; write 'max_latency_seconds'"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_settings(text, message):
    with pytest.raises(InputError) as raised:
        Rollout.parse(text)
    assert message in str(raised.value)


def answers(*texts: str | None, seconds: float = 0.1) -> list[Answer]:
    return [Answer(text, seconds) for text in texts]


COMPARED = [
    (answers("a", "b", "c", "d"), answers("a", "b", "c", "x"), None),  # 25 % is allowed
    (answers("a", "b", "c", "d"), answers("a", "b", "x", "x"), "disagree on 50% of 4"),
    (answers("a", "b"), answers(" a ", "b\n"), None),
    (answers("a", "b"), answers("a", None), None),
    (answers("a"), answers(None), "the version that serves answers no prompt"),
    (answers("a", "b"), None, None),
]


@pytest.mark.parametrize(("new", "old", "reason"), COMPARED)
def test_comparison(new, old, reason):
    found = refusal(new, old, 0.25, None)
    assert found is None if reason is None else reason in found


def test_percentile():
    assert percentile([float(n) for n in range(1, 21)], 0.95) == 19
    assert percentile([3.0, 1.0], 0.95) == 3.0
