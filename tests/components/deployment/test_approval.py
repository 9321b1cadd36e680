"""What a person says of a new version, over HTTP to a stand-in for Kubernetes: yes, no, or nothing in time."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes_server import status

from trimtab.base import progress
from trimtab.base.errors import InputError, NotReleased, StageError
from trimtab.components.deployment.rollout import approval, canary
from trimtab.components.deployment.rollout.canary import Account, roll_out
from trimtab.components.deployment.rollout.cluster import Cluster
from trimtab.components.deployment.rollout.settings import Rollout, inference_service

OLD, NEW = "a" * 64, "b" * 64
ID = NEW[:12]
STORE = "s3://bucket/store"
ROLLOUT = Rollout.parse(
    """
    service: assistant
    namespace: serving
    image: registry/vllm:1
    command: [vllm, serve, "{model}"]
    loader: registry/trimtab:1
    prompts: [one, two, three, four]
    ready_minutes: 0.02
    approval_minutes: 0.005
    """
)


@pytest.fixture
def go(cluster: Cluster):
    """A function: rolls an artifact out, looking often, with its account."""

    def rolled(digest: str, account: Account | None = None, **changes: Any) -> str:
        return roll_out(
            cluster, ROLLOUT.model_copy(update=changes), STORE, digest, poll=0.02, account=account or Account()
        )

    return rolled


def answers(entry: str):
    """A person, who writes an entry as soon as something waits."""
    return lambda entries: entries.update(assistant=entry)


@pytest.mark.parametrize(
    ("entry", "said", "kept"),
    [
        (f"approved {ID}", "approved", "approved"),
        (f"approved {NEW} by the owner of the service", "approved by the owner of the service", None),
        (f"  approved   {ID}   by   her\n", "approved by her", None),
    ],
)
def test_approved(entry, said, kept, server, go):
    go(OLD, approval_minutes=0)
    server.people = [answers(entry)]
    account = Account()
    go(NEW, account, approval_minutes=1)
    assert server.serving() == {NEW: 100}
    assert (f"assistant: {said}", "") in account.lines
    assert server.approvals == {"assistant": f"promoted {ID}, {kept or said}"}


def test_what_a_person_is_asked(server, go):
    """The question names what was compared, the command is told, and nothing takes over before the answer."""
    go(OLD, approval_minutes=0)
    seen = {}

    def person(entries: dict[str, str]) -> None:
        seen.update(entries, shares=server.serving())
        entries["assistant"] = f"approved {ID}"

    server.people = [person]
    account = Account()
    go(NEW, account, approval_minutes=1)
    assert seen["assistant"].startswith(f"waiting {ID}: 4 prompts answered, 95th percentile 0.0")
    assert seen["assistant"].endswith("0% otherwise than before") and seen["shares"] == {OLD: 90, NEW: 10}
    told, command = dict(account.lines), "kubectl -n serving patch configmap trimtab-approvals --type merge -p "
    for text, word in (("waits up to 1 minutes for approval", "approved"), ("to refuse it", "refused")):
        assert told[text] == command + f"""'{{"data": {{"assistant": "{word} {ID}"}}}}'"""


def test_refused(server, go):
    go(OLD, approval_minutes=0)
    (revision,) = server.revisions
    server.people = [answers(f"refused {ID} by her")]
    with pytest.raises(NotReleased) as raised:
        go(NEW, approval_minutes=1)
    assert str(raised.value) == f"assistant: {ID} was refused by her; rolled back, {revision} serves"
    assert server.applied[-1]["spec"]["predictor"]["canaryTrafficPercent"] == 0
    assert server.approvals == {"assistant": f"rolled back {ID}, refused by her"}


WRONG = [
    ("yes", f"'yes' is not valid; write 'approved {ID}' or 'refused {ID}'"),
    ("approved", f"'approved' is not valid; write 'approved {ID}'"),
    ("Approved " + ID, f"'Approved {ID}' is not valid; write 'approved {ID}'"),
    (f"approved {ID} by", f"'approved {ID} by' is not valid"),
    (f"approved {NEW[:11]}", f"'approved {NEW[:11]}' is not valid"),
    (f"approved {OLD[:12]} by her", f"'approved {OLD[:12]} by her' is of another artifact; write 'approved {ID}'"),
    ("", f"there is no entry 'assistant'; write 'approved {ID}'"),
]


@pytest.mark.parametrize(("entry", "message"), WRONG)
def test_a_wrong_answer_is_told_and_ends_nothing(entry, message, server, go):
    go(OLD, approval_minutes=0)
    server.people = [answers(entry)]
    account = Account()
    with pytest.raises(NotReleased) as raised:
        go(NEW, account)
    assert "was not approved within 0.005 minutes: trimtab-approvals: " in str(raised.value)
    assert message in str(raised.value)
    assert sum(message in text for text, _ in account.lines) == 1, "told once, however often it is read"
    assert server.applied[-1]["spec"]["predictor"]["canaryTrafficPercent"] == 0


def test_a_wrong_answer_can_be_put_right(server, go):
    go(OLD, approval_minutes=0)

    def in_two_steps(entries: dict[str, str]) -> None:
        entries.update(assistant=f"approve {ID}", other="waiting aaaaaaaaaaaa: so that the next person may act")

    server.people = [in_two_steps, answers(f"approved {ID}")]
    go(NEW, approval_minutes=1)
    assert server.serving() == {NEW: 100}


def test_an_old_approval_counts_for_nothing(server, go):
    """Neither that of another artifact, nor that of the same one in another rollout."""
    go(OLD, approval_minutes=0)
    for entry in (f"approved {OLD[:12]}", f"approved {ID}", f"promoted {ID}, approved by her"):
        server.approvals = {"assistant": entry}
        with pytest.raises(NotReleased, match="was not approved within"):
            go(NEW)
        assert server.serving() != {NEW: 100}
        assert server.approvals == {"assistant": f"rolled back {ID}"}


def test_the_cluster_is_away_while_it_waits(server, go, cluster):
    """For longer than one call is patient."""
    go(OLD, approval_minutes=0)

    def breaks(entries: dict[str, str]) -> None:
        server.faults = [("GET", 503, "busy")] * 3
        entries["other"] = "waiting aaaaaaaaaaaa: so that the next person may act"

    server.people = [breaks, answers(f"approved {ID}")]
    account = Account()
    go(NEW, account, approval_minutes=1)
    assert server.serving() == {NEW: 100} and server.faults == []
    assert any("the cluster answered 503" in text and "the rollout waits on" in text for text, _ in account.lines)


def test_a_stale_answer_does_not_count_while_the_cluster_is_away(server, go, monkeypatch):
    go(OLD, approval_minutes=0)
    server.approvals = {"assistant": f"approved {ID}"}
    ask = approval.ask

    def asked(*arguments: Any) -> None:
        ask(*arguments)
        server.faults = [("GET", 503, "busy")] * 99

    monkeypatch.setattr(approval, "ask", asked)
    with pytest.raises(StageError, match="was not approved within .* and it could not be rolled back"):
        go(NEW)
    assert server.applied[-1]["spec"]["predictor"]["canaryTrafficPercent"] == 10, "it was never promoted"


def test_rights_that_are_taken_away_end_it(server, go):
    go(OLD, approval_minutes=0)
    forbidden = ("GET", *status(403, "Forbidden", "may not get"))
    server.people = [lambda entries: server.faults.append(forbidden)]
    with pytest.raises(InputError, match="you may not; apply manifests/release"):
        go(NEW, approval_minutes=1)
    assert server.applied[-1]["spec"]["predictor"]["canaryTrafficPercent"] == 0


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("missing", "approval_minutes: namespace 'serving' has no ConfigMap 'trimtab-approvals'"),
        ("forbidden", "cannot change ConfigMap 'trimtab-approvals' in namespace 'serving': you may not"),
    ],
)
def test_where_nobody_could_approve_nothing_changes(trouble, message, server, go):
    go(OLD, approval_minutes=0)
    if trouble == "missing":
        server.approvals = None
    else:
        server.faults = [("PATCH", *status(403, "Forbidden", "may not patch"))]
    with pytest.raises(InputError) as raised:
        go(NEW)
    assert message in str(raised.value) and "manifests/release" in str(raised.value)
    assert len(server.applied) == 1


def test_the_question_disappears(server, go):
    go(OLD, approval_minutes=0)

    def deletes(entries: dict[str, str]) -> None:
        server.approvals = None

    server.people = [deletes]
    with pytest.raises(NotReleased, match="ConfigMap 'trimtab-approvals' is gone from namespace 'serving'"):
        go(NEW)


@pytest.mark.parametrize("entry", [f"approved {ID} by her", f"waiting {ID}: 4 prompts"])
def test_a_killed_rollout_finds_its_answer(entry, server, go, cluster):
    go(OLD, approval_minutes=0)
    cluster.apply(inference_service(ROLLOUT, STORE, NEW, canary=True))
    server.approvals = {"assistant": entry}  # written, and then the process was killed
    server.people = [answers(f"approved {ID} by her")]
    go(NEW, approval_minutes=1)
    assert server.serving() == {NEW: 100} and server.approvals == {"assistant": f"promoted {ID}, approved by her"}
    assert not any("waiting" in value for data in server.written for value in data.values()), "asked once"


def test_an_answer_to_other_settings_is_asked_for_again(server, go, cluster):
    go(OLD, approval_minutes=0)
    cluster.apply(inference_service(ROLLOUT, STORE, NEW, canary=True))
    server.approvals = {"assistant": f"approved {ID}"}
    with pytest.raises(NotReleased, match="was not approved within"):
        go(NEW, image="registry/vllm:2")


def test_a_first_version_waits_too(server, go, cluster):
    with pytest.raises(NotReleased, match="was not approved within .*; deleted, it had no version before"):
        go(NEW)
    assert server.service is None
    cluster.apply(inference_service(ROLLOUT, STORE, NEW, canary=False))
    server.answer("GET", "/", {}, None, {}), server.answer("GET", "/", {}, None, {})  # ready
    server.approvals = {"assistant": f"waiting {ID}: 4 prompts"}  # and then the process was killed
    server.people = [answers(f"refused {ID}")]
    with pytest.raises(NotReleased, match="was refused; deleted, it had no version before"):
        go(NEW, approval_minutes=1)
    assert server.service is None


def test_what_serves_is_not_asked_about_again(server, go):
    go(OLD, approval_minutes=0)
    go(NEW, approval_minutes=0)
    server.approvals = {"assistant": f"refused {ID}"}
    assert "already" in go(NEW) and server.serving() == {NEW: 100}


@pytest.mark.parametrize("annotation", ["trimtab/artifact", "team"])
def test_who_changes_the_canary_while_it_waits_gets_nothing_promoted(annotation, server, go):
    """KServe hands annotations on to the pods: any makes another revision, which nobody has compared."""
    go(OLD, approval_minutes=0)

    def meddles(entries: dict[str, str]) -> None:
        server.service["metadata"]["annotations"][annotation] = "c" * 64
        entries["assistant"] = f"approved {ID}"

    server.people = [meddles]
    with pytest.raises((NotReleased, StageError), match="not its latest version any more|deleted or replaced"):
        go(NEW, approval_minutes=1)
    assert server.serving().get(NEW, 0) <= 10 and server.applied[-1]["spec"]["predictor"]["canaryTrafficPercent"] < 100


def test_reminders(server, go, monkeypatch, capsys):
    monkeypatch.setattr(canary, "REMIND_SECONDS", 0.03)
    monkeypatch.delenv(progress.ENVIRONMENT, raising=False)
    go(OLD, approval_minutes=0)
    with pytest.raises(NotReleased):
        go(NEW)
    assert capsys.readouterr().err.count("rollout: waits for approval, minutes (0/1)") >= 2


def test_decide(server, cluster):
    server.approvals = {"assistant": f"waiting {ID}: 4 prompts", "other": "waiting aaaaaaaaaaaa: 8 prompts"}
    approval.decide(cluster, "assistant", NEW, "approved", "  her \n")
    assert server.approvals == {"assistant": f"approved {ID} by her", "other": "waiting aaaaaaaaaaaa: 8 prompts"}
    approval.decide(cluster, "assistant", NEW, "approved", "her")  # as after an answer that was lost on its way
    assert len(server.written) == 1


def test_decide_beside_others(server, cluster):
    """Another service's answer in between is no reason to fail, and is kept."""
    server.approvals = {"assistant": f"waiting {ID}: 4 prompts"}
    server.people = [lambda entries: server.written.append({"other": entries.setdefault("other", "refused aaa")})]
    version = server._config

    def outdated(method: str, *rest: Any) -> tuple[int, Any]:
        code, found = version(method, *rest)
        if method == "GET" and len(server.written) == 1:
            found["metadata"]["resourceVersion"] = "0"
            server.written.append({})
        return code, found

    server._config = outdated
    approval.decide(cluster, "assistant", NEW, "refused")
    assert server.approvals == {"assistant": f"refused {ID}", "other": "refused aaa"}


def test_a_question_that_could_not_be_asked_is_an_error(server, cluster):
    server.faults = [("PATCH", *status(409, "Conflict", "the object has been modified"))]
    with pytest.raises(StageError, match="ConfigMap 'trimtab-approvals' changes all the time; run the command again"):
        approval.ask(cluster, "assistant", NEW, "4 prompts")


NOT_WAITING = [
    ({}, "no rollout of it waits for approval: trimtab-approvals: there is no entry 'assistant'"),
    ({"assistant": f"waiting {OLD[:12]}: 4 prompts"}, "is of another artifact"),
    ({"assistant": f"refused {ID} by her"}, f"{ID} was refused by her already"),
    ({"assistant": f"promoted {ID}, approved by her"}, f"'promoted {ID}, approved by her' is not valid"),
    (None, "ConfigMap 'trimtab-approvals' is gone from namespace 'serving'; apply manifests/release there"),
]


@pytest.mark.parametrize(("entries", "message"), NOT_WAITING)
def test_nothing_to_decide(entries, message, server, cluster):
    server.approvals = entries
    with pytest.raises(InputError) as raised:
        approval.decide(cluster, "assistant", NEW, "approved")
    assert message in str(raised.value)
    assert server.written == []
