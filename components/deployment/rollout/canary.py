"""Brings a release to a cluster: a canary beside the version that serves, compared, then promoted or rolled back.

Whatever happens after the canary was applied, a refusal, an error or Ctrl-C, takes its traffic away again. What a
killed process leaves behind is a canary with its share, which the next rollout of the same release takes up.
"""

from __future__ import annotations

import difflib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimtab.base import progress
from trimtab.base.errors import InputError, NotReleased, StageError, TrimtabError
from trimtab.components.deployment.rollout import approval, comparison, service_status
from trimtab.components.deployment.rollout.approval import Answer
from trimtab.components.deployment.rollout.cluster import Cluster
from trimtab.components.deployment.rollout.settings import ARTIFACT, Rollout, inference_service

POLL_SECONDS = 5.0
#: Between two reminders of a rollout that waits for a person.
REMIND_SECONDS = 300.0


def difference(cluster: Cluster, rollout: Rollout, store: str, digest: str, force: bool = False) -> str:
    """Returns what a rollout would change, as the cluster itself would apply it: a unified diff, "" for nothing."""
    before = cluster.read(rollout.service)
    wanted = inference_service(rollout, store, digest, canary=service_status.serving_revision(before) is not None)
    after = cluster.apply(wanted, force=force, dry=True)
    shown = (service_status.lines(before), service_status.lines(after))
    lines = difflib.unified_diff(*shown, "in the cluster", "after the rollout", lineterm="")
    return "\n".join(lines)


def roll_out(
    cluster: Cluster,
    rollout: Rollout,
    store: str,
    digest: str,
    force: bool = False,
    poll: float = POLL_SECONDS,
    account: Account | None = None,
) -> str:
    """Rolls an artifact out and returns a sentence of how it went.

    Args:
        force: takes over fields of the service that someone else owns.
        poll: seconds between two looks at the cluster.
        account: is told what happens.

    Raises:
        NotReleased: the new version is not ready in time, answers wrongly or late, or was not approved; the version
            before it serves.
        InputError: someone else's rollout is under way, or the service cannot have a canary, or nobody can approve.
    """
    return _Delivery(cluster, rollout, store, digest, force, poll, account or Account()).run()


class Account:
    """What happens in a rollout: told as it happens, and kept for those who read of it afterwards.

    `lines` holds (what happened, a command that belongs to it or ""), `figures` the comparison's.

    Args:
        tell: is given all lines so far whenever there is a new one.
    """

    def __init__(self, tell: Callable[[list[str]], None] = lambda _: None) -> None:
        self.lines: list[tuple[str, str]] = []
        self.figures: dict[str, float] = {}
        self._tell = tell

    def say(self, text: str, command: str = "") -> None:
        self.lines.append((text, command))
        told = [f"{text}: {command}" if command else text for text, command in self.lines]
        progress.report("rollout", told[-1])
        self._tell(told)


@dataclass
class _Delivery:
    """One rollout of one artifact.

    `old` is the revision that serves until then, None for a first version; `answer` what a person said last;
    `is_open` whether a question of this artifact stands in the ConfigMap, or an answer that was not used up.
    """

    cluster: Cluster
    rollout: Rollout
    store: str
    digest: str
    force: bool
    poll: float
    account: Account
    old: str | None = None
    answer: Answer = Answer("")
    is_open: bool = False

    def run(self) -> str:
        service = self.rollout.service
        before = self.cluster.read(service)
        self.old, share = service_status.serving_revision(before), service_status.canary_percent(before)
        if share and service_status.annotation(before, ARTIFACT) != self.digest:
            other = approval.short(service_status.annotation(before, ARTIFACT) or "unknown")
            raise InputError(
                f"service: a rollout to '{service}' is under way ({other}, {share} %); wait for it, or roll that "
                "release out again, which takes up what was killed"
            )
        if self.rollout.approval_minutes:
            approval.check(self.cluster)
            self.is_open = bool(self._answered().word)
        if self.old and share is None and service_status.is_settled(before) and self._unchanged(before):
            # A first version has all of the traffic while it waits, and its rollout may have been killed then.
            if not self.is_open or service_status.status(before).get("previousRolledoutRevision"):
                return f"{service} serves this release already"
            self.old = None
        elif before and self.old is None:
            raise InputError(
                f"service: '{service}' has no version that a canary could stand beside (KServe without Knative, or it "
                "was never ready); write another service, or delete this one"
            )
        wanted = self._service(canary=self.old is not None)
        # What the cluster refuses, it refuses before anything has changed.
        would_be = self.cluster.apply(wanted, force=self.force, dry=True)
        # An answer holds for the rollout that asked, when that was killed: not for another one of the same artifact.
        taken_up = (
            before is not None
            and (self.old is None or bool(share))
            and service_status.annotation(before, ARTIFACT) == self.digest
            and would_be["spec"] == before["spec"]
        )
        try:
            self.cluster.apply(wanted, force=self.force)
            beside = f"with {self.rollout.canary_percent} % of the traffic" if self.old else "as the first version"
            self.account.say(f"{service}: applied {beside}")
            changed = service_status.template(would_be) != service_status.template(before)
            ready = self._until_ready(service_status.status(before).get("latestCreatedRevision") if changed else None)
            compared = self._compare(ready)
            if self.rollout.approval_minutes:
                if not (taken_up and self.is_open):
                    approval.ask(self.cluster, service, self.digest, compared)
                    self.is_open = True
                self._until_approved(ready)
            if self.old:
                self.cluster.apply(self._service(canary=False), force=self.force)
                self._until(self.rollout.ready_minutes, service_status.promoted(ready), "does not take over")
        except BaseException as error:
            self._failed(error)
            raise
        self._settle("promoted")
        self.account.say(f"{service} serves {approval.short(self.digest)}")
        return f"{service} serves {approval.short(self.digest)}"

    def _service(self, canary: bool) -> dict[str, Any]:
        return inference_service(self.rollout, self.store, self.digest, canary)

    def _unchanged(self, before: dict[str, Any]) -> bool:
        """Whether applying would change nothing, as the cluster itself says: its defaults are no change."""
        after = self.cluster.apply(self._service(canary=False), force=self.force, dry=True)
        return after["spec"] == before["spec"]

    def _failed(self, error: BaseException) -> None:
        """Rolls back, and raises what says so where the error itself does not."""
        try:
            done = self._roll_back()
        except TrimtabError as second:
            why = str(error) or type(error).__name__
            raise StageError(
                f"{why}; and it could not be rolled back ({second}): {self.rollout.service} keeps the new version's "
                "share of the traffic until the same rollout is run again"
            ) from error
        self._settle("rolled back")
        if isinstance(error, NotReleased):
            raise NotReleased(f"{error}; {done}") from None

    def _roll_back(self) -> str:
        """Gives the traffic back to the version before; a service that had none is deleted, one that is gone stays so,
        and what someone else has made of it since is theirs."""
        name = self.rollout.service
        now = self.cluster.read(name)
        if now is None:
            done = "it is gone"
        elif service_status.annotation(now, ARTIFACT) != self.digest:
            done = "it is left alone, for it serves something else by now"
        elif self.old is None:
            self.cluster.delete(name)
            done = "deleted, it had no version before"
        else:
            service = self._service(canary=True)
            service["spec"]["predictor"]["canaryTrafficPercent"] = 0
            self.cluster.apply(service, force=True)  # the canary was ours a moment ago
            done = f"rolled back, {self.old} serves"
        self.account.say(f"{name}: {done}")
        return done

    def _settle(self, end: str) -> None:
        """Uses up the question and its answer; a cluster that is away for that undoes nothing."""
        if not self.is_open:
            return
        try:
            approval.settle(self.cluster, self.rollout.service, self.digest, end, self.answer)
        except TrimtabError as error:
            self.account.say(f"its approval is not marked as used: {error}")

    def _until_ready(self, replaced: str | None) -> dict[str, Any]:
        """Waits until the new revision is ready and, beside an old one, has an address of its own.

        Args:
            replaced: the latest revision before, when there must be another one now. The status tells nothing of its
                own age: `observedGeneration` is the one of Knative's service, which counts other changes.
        """

        def reached(service: dict[str, Any]) -> bool:
            predictor = service_status.status(service)
            latest = predictor.get("latestReadyRevision")
            fresh = latest and latest == predictor.get("latestCreatedRevision") and latest not in (self.old, replaced)
            reachable = self.old is None or service_status.url(service, latest)
            return bool(service_status.is_ready(service) and fresh and reachable)

        return self._until(self.rollout.ready_minutes, reached, "is not ready")

    def _until(self, minutes: float, reached: Callable[[dict[str, Any]], bool], otherwise: str) -> dict[str, Any]:
        end = time.monotonic() + 60 * minutes
        while True:
            service = self._present()
            if reached(service):
                return service
            if time.monotonic() + self.poll > end:
                raise NotReleased(
                    f"the new version of {self.rollout.service} {otherwise} within {minutes:g} minutes"
                    f"{service_status.why_not_ready(service)}"
                )
            time.sleep(self.poll)

    def _present(self) -> dict[str, Any]:
        service = self.cluster.read(self.rollout.service)
        if service is None:
            raise StageError(f"service: '{self.rollout.service}' was deleted while it was rolled out")
        return service

    def _compare(self, service: dict[str, Any]) -> str:
        """Asks the new version, and the old one where there is one; raises when the new one must not take over."""
        rollout, latest = self.rollout, service_status.status(service)["latestReadyRevision"]
        url = service_status.url(service, latest) if self.old else service["status"].get("url", "")
        new = comparison.ask(url, rollout.service, rollout.prompts, rollout.max_tokens)
        old = None
        if self.old:
            before = service_status.url(service, self.old)
            old = comparison.ask(before, rollout.service, rollout.prompts, rollout.max_tokens)
        self.account.figures = comparison.figures(new, old)
        refusal = comparison.refusal(new, old, rollout.max_disagreement, rollout.max_latency_seconds)
        if refusal:
            raise NotReleased(f"{rollout.service}: {refusal}")
        compared = comparison.describe(self.account.figures)
        self.account.say(f"{rollout.service}: {compared}")
        return compared

    def _until_approved(self, ready: dict[str, Any]) -> None:
        """Waits for a person; a wrong answer, and a cluster that is away, are told and waited out."""
        rollout, digest, minutes = self.rollout, self.digest, self.rollout.approval_minutes
        for word, told in (("approved", f"waits up to {minutes:g} minutes for approval"), ("refused", "to refuse it")):
            self.account.say(told, approval.command(rollout.namespace, rollout.service, digest, word))
        started = reminded = time.monotonic()
        fault = ""
        while True:
            now = ready
            try:  # the answer first: what it let through is looked at once more
                self.answer, now = self._answered(), self.cluster.read(rollout.service)
                trouble = self.answer.fault
            except StageError as error:
                trouble = f"{error}; the rollout waits on"
            if now is None or service_status.annotation(now, ARTIFACT) != digest:
                raise StageError(f"service: '{rollout.service}' was deleted or replaced while it was rolled out")
            newest = service_status.status(now).get("latestReadyRevision")
            if newest != service_status.status(ready)["latestReadyRevision"]:
                raise NotReleased(f"{rollout.service}: what was compared is not its latest version any more")
            if self.answer.word == "refused":
                raise NotReleased(f"{rollout.service}: {approval.short(digest)} was {self.answer.said}")
            if self.answer.word == "approved":
                self.account.say(f"{rollout.service}: {self.answer.said}")
                return
            if trouble and trouble != fault:
                self.account.say(trouble)
            fault, clock = trouble, time.monotonic()
            if clock + self.poll > started + 60 * minutes:
                because = f": {fault}" if fault else ""
                raise NotReleased(
                    f"the new version of {rollout.service} was not approved within {minutes:g} minutes{because}"
                )
            if clock - reminded >= REMIND_SECONDS:
                reminded = clock
                gone = int((clock - started) / 60)
                progress.report("rollout", "waits for approval, minutes", gone, math.ceil(minutes))
            time.sleep(self.poll)

    def _answered(self) -> Answer:
        return approval.read(self.cluster, self.rollout.service, self.digest)
