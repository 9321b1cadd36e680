"""Whether a person lets a new version take over: asked and answered in a ConfigMap, bound to one artifact.

Not on the InferenceService: KServe hands its annotations on to the pods, so that to annotate a canary makes another
revision, which nobody has compared. A ConfigMap also leaves the right to approve apart from that to change a service.

An entry of it belongs to the service of its name:

    waiting 0123456789ab: 8 prompts …        what a rollout writes when it asks
    approved 0123456789ab by a person        what a person writes, `by …` or not
    refused 0123456789ab
    promoted 0123456789ab, approved by …     what the rollout makes of it, so that no answer is used twice
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from trimtab.base.errors import InputError
from trimtab.components.deployment.rollout.cluster import Cluster

CONFIG_MAP = "trimtab-approvals"
ANSWERS = ("approved", "refused")
#: Digits of the artifact's digest that an answer must name.
DIGITS = 12
_ENTRY = re.compile(rf"(waiting|approved|refused)\s+([0-9a-f]{{{DIGITS},64}})(?::.*|\s+by\s+(\S.*))?", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """`word` is one of ANSWERS, "waiting" or, where the entry is none for this artifact, ""; then `fault` says why."""

    word: str
    who: str = ""
    fault: str = ""

    @property
    def said(self) -> str:
        """'approved by …', as far as it is known by whom."""
        return f"{self.word} by {self.who}" if self.who else self.word


def short(digest: str) -> str:
    """Returns what an answer calls an artifact."""
    return digest[:DIGITS]


def command(namespace: str, service: str, digest: str, word: str = "approved") -> str:
    """Returns the command that answers, for who has kubectl and not trimtab."""
    entry = json.dumps({"data": {service: f"{word} {short(digest)}"}})
    return f"kubectl -n {namespace} patch configmap {CONFIG_MAP} --type merge -p '{entry}'"


def check(cluster: Cluster) -> None:
    """Refuses, before anything has changed, a namespace in which nothing could be asked.

    Raises:
        InputError: it has no such ConfigMap, or it may not be changed.
    """
    if cluster.read_config(CONFIG_MAP) is None:
        raise InputError(
            f"approval_minutes: namespace '{cluster.namespace}' has no ConfigMap '{CONFIG_MAP}', in which a person "
            "approves; apply manifests/release there, or write approval_minutes: 0"
        )
    cluster.change_config(CONFIG_MAP, {}, dry=True)


def ask(cluster: Cluster, service: str, digest: str, text: str) -> None:
    """Asks, in place of whatever was asked or answered of this service before."""
    cluster.change_config(CONFIG_MAP, {service: f"waiting {short(digest)}: {text}"})


def read(cluster: Cluster, service: str, digest: str) -> Answer:
    """Returns what is said of this artifact now."""
    found = cluster.read_config(CONFIG_MAP)
    return _answer(_entry(found, service), service, digest) if found else Answer("", fault=_missing(cluster))


def settle(cluster: Cluster, service: str, digest: str, end: str, answer: Answer) -> None:
    """Writes how it ended in place of the answer, which is used up by that."""
    said = f", {answer.said}" if answer.word in ANSWERS else ""
    cluster.change_config(CONFIG_MAP, {service: f"{end} {short(digest)}{said}"})


def decide(cluster: Cluster, service: str, digest: str, word: str, who: str = "") -> None:
    """Answers a rollout that waits.

    Args:
        word: one of ANSWERS.
        who: a name to keep with the answer; "" for none.

    Raises:
        InputError: no rollout of this artifact waits; says what there is instead.
    """
    wanted = Answer(word, " ".join(who.split()))
    entry = f"{word} {short(digest)}" + (f" by {wanted.who}" if wanted.who else "")
    for _ in range(5):  # other services' answers are entries of the same ConfigMap
        found = cluster.read_config(CONFIG_MAP)
        if not found:
            raise InputError(f"release: {_missing(cluster)}")
        said = _answer(_entry(found, service), service, digest)
        if said == wanted:  # also when an answer of the cluster was lost on its way, and it was sent twice
            return
        if said.word != "waiting":
            state = f"{short(digest)} was {said.said} already" if said.word else said.fault
            raise InputError(f"release: no rollout of it waits for approval: {state}")
        if cluster.change_config(CONFIG_MAP, {service: entry}, version=found["metadata"].get("resourceVersion", "")):
            return
    raise InputError(f"release: ConfigMap '{CONFIG_MAP}' changes all the time; run the command again")


def _entry(found: dict[str, Any], service: str) -> str:
    return str((found.get("data") or {}).get(service, "")).strip()


def _missing(cluster: Cluster) -> str:
    return f"ConfigMap '{CONFIG_MAP}' is gone from namespace '{cluster.namespace}'; apply manifests/release there"


def _answer(entry: str, service: str, digest: str) -> Answer:
    remedy = f"write 'approved {short(digest)}' or 'refused {short(digest)}'"
    match = _ENTRY.fullmatch(entry)
    if not entry:
        return Answer("", fault=f"{CONFIG_MAP}: there is no entry '{service}'; {remedy}")
    if not match:
        return Answer("", fault=f"{CONFIG_MAP}: {service}: '{entry[:200]}' is not valid; {remedy}")
    if not digest.startswith(match[2]):
        return Answer("", fault=f"{CONFIG_MAP}: {service}: '{entry[:200]}' is of another artifact; {remedy}")
    return Answer(match[1], " ".join((match[3] or "").split()))
