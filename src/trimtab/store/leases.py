"""Who is at work in a store: a put holds a lease, and the collection of garbage has the store for itself.

Both write first and look afterwards, so of two that begin at once at least one sees the other. A put that meets a
collection waits for its end; a collection that meets a put waits for a while and then gives up. What a dead process
left behind ends with its time.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from trimtab.base import progress
from trimtab.base.errors import StoreError, TrimtabError

#: How long a put may take that finds old files in the store. Younger ones are safe in any case.
LEASE = timedelta(days=1)
#: How long a collection that died keeps others waiting.
COLLECTION = timedelta(minutes=10)
#: Seconds that a collection waits for puts to end, while it keeps new ones waiting.
WAIT = 60.0
#: Seconds between two looks.
POLL = 0.2

MARKER = "collecting.json"


@contextlib.contextmanager
def working(back: Any) -> Iterator[None]:
    """Holds a lease: while the body runs no garbage is collected."""
    key = f"leases/{uuid.uuid4().hex}.json"
    back.prepare()
    while True:
        back.write(key, _until(LEASE))
        if not is_collecting(back):
            break
        back.remove(key)
        wait(back)
    try:
        yield
    finally:
        # Not worth a failure: without the right to delete, it ends with its time.
        with contextlib.suppress(TrimtabError):
            back.remove(key)


def is_collecting(back: Any) -> bool:
    """Tells whether garbage is being collected."""
    return _holds(back.read(MARKER))


def wait(back: Any) -> None:
    """Returns when no garbage is being collected."""
    if is_collecting(back):
        progress.report("store", f"waiting for the garbage of {back.uri} to be collected")
    while is_collecting(back):
        time.sleep(POLL)


class Collection:
    """The right to remove things, which must be kept up while they are removed."""

    def __init__(self, back: Any):
        self._back, self._renewed = back, time.monotonic()

    def keep_up(self) -> None:
        """Renews it once a minute.

        Raises:
            StoreError: it has run out meanwhile, so that somebody may be at work.
        """
        passed = time.monotonic() - self._renewed
        if passed > COLLECTION.total_seconds() / 2:
            raise StoreError("collecting garbage took too long between two steps: run it again")
        if passed > 60:
            self._back.write(MARKER, _until(COLLECTION))
            self._renewed = time.monotonic()


@contextlib.contextmanager
def collecting(back: Any) -> Iterator[Collection]:
    """Keeps puts out while the body runs.

    Raises:
        StoreError: another collection runs, or a put does not end in time.
    """
    back.prepare()
    if not back.create(MARKER, _until(COLLECTION)):
        if is_collecting(back):
            raise StoreError(f"the garbage of {back.uri} is being collected already: run it again later")
        back.write(MARKER, _until(COLLECTION))
    try:
        deadline = time.monotonic() + WAIT
        while held := [name for name in back.names("leases") if _holds(back.read(f"leases/{name}"))]:
            if time.monotonic() > deadline:
                problem = f"{len(held)} processes write to {back.uri} (leases/{held[0]})"
                remedy = "run it again when they are done; the lease of one that died ends in a day"
                raise StoreError(f"{problem}: {remedy}")
            time.sleep(POLL)
        yield Collection(back)
    finally:
        back.remove(MARKER)


def _until(span: timedelta) -> bytes:
    return json.dumps({"until": (datetime.now(UTC) + span).isoformat(), "by": uuid.uuid4().hex}).encode()


def _holds(data: bytes | None) -> bool:
    if data is None:
        return False
    try:
        return datetime.fromisoformat(json.loads(data)["until"]) > datetime.now(UTC)
    except (ValueError, LookupError, TypeError):  # not ours: whatever it is, it does not end by itself
        return False
