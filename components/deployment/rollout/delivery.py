"""From a release in the store to a service in a cluster: what `trimtab deploy` and the task of a run share."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trimtab import stages
from trimtab.base import progress, signing
from trimtab.base.errors import InputError, NotReleased, TrimtabError
from trimtab.components.deployment import registry as entry
from trimtab.components.deployment.rollout import approval
from trimtab.components.deployment.rollout.canary import Account, roll_out
from trimtab.components.deployment.rollout.cluster import Cluster
from trimtab.components.deployment.rollout.settings import Rollout, asked
from trimtab.loop import status
from trimtab.release.shelf import SERVING
from trimtab.release.verification import verify
from trimtab.store import Store, open_store
from trimtab.store.address import split_release

#: How the task of a run ends. A rollback does not fail it, for KFP keeps no page of a failed task: another one does.
SERVES, ROLLED_BACK, NOT_ASKED = "serves", "rolled_back", "not_asked"


def foresee(text: str, store: str, registry: str = "") -> None:
    """Refuses a rollout that the cluster could not take, before there is anything to roll out, and a Model Registry.

    Args:
        text, store: as `asked` has them.
        registry: the address of a Model Registry, or "".

    Raises:
        InputError: it is not valid, or its namespace has no InferenceServices, or nobody could approve there; or the
            registry could not be entered from here.
    """
    if registry:
        entry.check(registry)
    rollout = asked(text, store)
    if rollout is None:
        return
    cluster = Cluster.connect(rollout.namespace)
    cluster.read(rollout.service)
    if rollout.approval_minutes:
        approval.check(cluster)


def locate(release: str) -> Store:
    """Returns the store of a release, which the pods of a service must reach too.

    Raises:
        InputError: it is no URI of a release, or one of a folder.
    """
    parts = split_release(release)
    if not parts or not parts[0].startswith("s3://"):
        raise InputError(
            f"release: '{release}' cannot be read from a cluster; write s3://bucket/prefix/releases/NAME/VERSION"
        )
    return open_store(parts[0])


def proven(store: Store, release: str, keys: Sequence[str]) -> str:
    """Verifies a release and returns the digest of its artifact; `keys` are PEM, or paths of it."""
    return verify(store, release, [signing.public_key(key) for key in keys]).predicate.artifact.digest


def remember(store: Store, rollout: Rollout, digest: str) -> None:
    """Pins what a service serves now, so that it is neither withdrawn nor collected; trouble is told and fails nothing.
    """
    try:
        store.pin(f"{SERVING}{rollout.namespace}.{rollout.service}", [store.tree(digest)])
    except TrimtabError as error:
        progress.report("rollout", f"that {digest[:12]} serves could not be written into the store: {error}")


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Lets SIGTERM, by which a pod is ended, take the canary's traffic away as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt("ended by SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(
    release: str, rollout: str, run_id: str, page: Any, metrics: Any, registry: str = ""
) -> tuple[str, str]:
    """Rolls a release out where that is asked for, and returns how it ended: one of the three, and a sentence.

    It is entered in the Model Registry, where one is named, unless it was rolled back.

    Args:
        release: its URI.
        rollout: a Rollout, YAML or JSON; or "".
        run_id: under which those who watch the run are told.
        page: Markdown artifact: what happened.
        metrics: Metrics artifact: the comparison's figures.
        registry: the address of a Model Registry; or "".

    Raises:
        NotVerified: the release is not what was judged and signed.
        InputError, StageError: the rollout or the entry could not be done; doing it again is safe.
    """
    parts = split_release(release)
    wanted = asked(rollout, parts[0] if parts else release)
    if wanted is None:
        account = Account()
        _enter(registry, release, account)
        return _told(page, NOT_ASKED, f"{release} is served nowhere: the run has no `rollout`", account)
    store = locate(release)
    account = Account(lambda lines: status.write_rollout(store, run_id, lines))
    digest = proven(store, release, wanted.keys)
    cluster = Cluster.connect(wanted.namespace)
    try:
        with unwinding():
            end, sentence = SERVES, roll_out(cluster, wanted, store.uri, digest, account=account)
        remember(store, wanted, digest)
        _enter(registry, release, account)
    except NotReleased as error:
        end = ROLLED_BACK
        sentence = f"{release} does not serve: {error} (the release stays: `trimtab deploy` rolls it out again)"
    stages.log_metrics(metrics, account.figures)
    return _told(page, end, sentence, account)


def _enter(registry: str, release: str, account: Account) -> None:
    """Enters a release in a Model Registry, "" for none; that one has it already is as good."""
    if registry:
        store, name, version = split_release(release)
        new = entry.register(registry, name, version, release, open_store(store).read_release(release))
        account.say(f"{name} {version} {'is entered' if new else 'stands already'} in the Model Registry at {registry}")


def _told(page: Any, end: str, sentence: str, account: Account) -> tuple[str, str]:
    lines = [f"# {sentence}", ""]
    for text, command in account.lines:
        lines += [f"- {text}", *(["", f"      {command}", ""] if command else [])]
    Path(page.path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return end, sentence
