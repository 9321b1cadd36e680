"""Who is at work in a store: a put holds a lease, and the collection of garbage has the store for itself.

Both write first and look afterwards, so of two that begin at once at least one sees the other. A put that meets a
collection waits for its end; a collection that meets a put waits for a while and then gives up.

A right is an object of the store that names its end, and nobody but its owner writes it: a lease is called by a random
name, a collection by a number, one more than the last, which only one can create. What is done by a right is done
before its end, by the clock of the store, or refused by the store itself: a server refuses a signed request that comes
later than it says, and in a folder a lock of the kernel is held besides. So a process that was suspended, for however
long, does no harm when it goes on. Others take a right for ended `MARGIN` after its end, by their own clock: the clocks
of machines may differ by as much from the store's. An owner renews its right, before its end or not at all.
"""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

from trimtab.base import progress
from trimtab.base.errors import StoreError, TrimtabError
from trimtab.store import clock
from trimtab.store.clock import Late

#: How long a right holds that is not renewed: what a dead process keeps others waiting, with `MARGIN`.
SPAN = timedelta(minutes=15)
#: How old it is when its owner renews it.
RENEWAL = SPAN / 3
#: How far a machine's clock may be from the store's.
MARGIN = timedelta(minutes=2)
#: Seconds that a collection waits for puts to end, while it keeps new ones waiting.
WAIT = 60.0
#: Seconds between two looks.
POLL = 0.2

LEASES, COLLECTIONS = "leases", "collecting"

Result = TypeVar("Result")


class Right:
    """A lease or a collection that this process owns; several threads may use it."""

    def __init__(self, back: Any, key: str):
        self._back, self._key = back, key
        self._lock = threading.Lock()
        self._began = clock.now()
        #: When it ends: what is done by it must be done before.
        self.until = self._began + SPAN.total_seconds()

    @property
    def document(self) -> bytes:
        """What says in the store until when it holds."""
        return _document(self.until)

    def keep_up(self) -> None:
        """Renews it when it is old enough.

        Raises:
            Late: it has ended.
        """
        if clock.now() - self._began < RENEWAL.total_seconds():
            return
        with self._lock:
            began = clock.now()
            if began - self._began >= RENEWAL.total_seconds():
                until = began + SPAN.total_seconds()
                self._back.write(self._key, _document(until), before=self.until)
                self._began, self.until = began, until

    def check(self) -> None:
        """Refuses to go on where it has ended.

        Raises:
            Late: it has.
        """
        clock.check(self.until, self._key)


def under_lease(back: Any, work: Callable[[Right], Result]) -> Result:
    """Returns what work returns while no garbage is collected; it is done again where its lease ended meanwhile."""
    while True:
        try:
            with working(back) as lease:
                result = work(lease)
                lease.check()
            return result
        except Late:
            progress.report("store", f"a lease in {back.uri} has run out, as when a machine sleeps: doing it again")


@contextlib.contextmanager
def working(back: Any) -> Iterator[Right]:
    """Holds a lease: until it ends no garbage is collected."""
    back.prepare()
    while True:
        key = f"{LEASES}/{uuid.uuid4().hex}.json"  # never again: who found it ended may remove it late
        lease = Right(back, key)
        back.write(key, lease.document)
        if not is_collecting(back):
            break
        back.remove(key)
        wait(back)
    try:
        with _locked(back, lease, exclusive=False):
            yield lease
    finally:
        # Not worth a failure: without the right to delete, it ends with its time.
        with contextlib.suppress(TrimtabError):
            back.remove(key)


def is_collecting(back: Any) -> bool:
    """Tells whether garbage is being collected."""
    return _last(back)[1]


def wait(back: Any) -> None:
    """Returns when no garbage is being collected."""
    if is_collecting(back):
        progress.report("store", f"waiting for the garbage of {back.uri} to be collected")
    while is_collecting(back):
        clock.sleep(POLL)


@contextlib.contextmanager
def collecting(back: Any) -> Iterator[Right]:
    """Keeps puts out while the body runs.

    Raises:
        StoreError: another collection runs, or a put does not end in time.
    """
    back.prepare()
    number, holds = _last(back)
    key = f"{COLLECTIONS}/{number + 1:09d}.json"
    right = Right(back, key)
    if holds or not back.create(key, right.document):
        raise StoreError(f"the garbage of {back.uri} is being collected already: run it again later")
    if _last(back)[0] > number + 1:  # others came and went meanwhile, and removed the number that we took
        back.remove(key)
        raise StoreError(f"the garbage of {back.uri} is being collected already: run it again later")
    try:
        for name in back.names(COLLECTIONS):
            if _number(name) <= number:
                back.remove(f"{COLLECTIONS}/{name}")
        deadline = clock.now() + WAIT
        while held := _leases(back):
            _give_up(back, deadline, f"{len(held)} processes write to {back.uri} (leases/{held[0]})")
            right.keep_up()
        with _locked(back, right, exclusive=True, deadline=deadline):
            yield right
    finally:
        # The last one stays, ended: its number is never used again.
        with contextlib.suppress(TrimtabError):
            back.write(key, _document(0.0), before=right.until)


def _leases(back: Any) -> list[str]:
    """Returns the names of the leases that hold, after removing those that have ended."""
    held = []
    for name in back.names(LEASES):
        data = back.read(f"{LEASES}/{name}")
        if _holds(data):
            held.append(name)
        elif data is not None:
            back.remove(f"{LEASES}/{name}")
    return held


@contextlib.contextmanager
def _locked(back: Any, right: Right, exclusive: bool, deadline: float | None = None) -> Iterator[None]:
    """Holds the back end's own lock, where it has one: which says who is alive though its right has ended."""
    with contextlib.ExitStack() as held:
        told = False
        while not (lock := back.lock(exclusive)):
            if deadline is not None:
                _give_up(back, deadline, f"a process that was suspended still writes to {back.uri}")
            elif not told:
                progress.report("store", f"waiting for a suspended collection of {back.uri}: let it go on, or end it")
                told = True
            clock.sleep(POLL)
            right.keep_up()
        held.enter_context(lock)
        yield


def _give_up(back: Any, deadline: float, problem: str) -> None:
    if clock.now() > deadline:
        ends = f"the lease of one that died ends in {(SPAN + MARGIN) / timedelta(minutes=1):.0f} min"
        raise StoreError(f"{problem}: run it again when they are done; {ends}")
    clock.sleep(POLL)


def _last(back: Any) -> tuple[int, bool]:
    """Returns the number of the newest collection, 0 where there was none, and whether it holds."""
    names = back.names(COLLECTIONS)
    if not names:
        return 0, False
    last = max(names, key=_number)
    return _number(last), _holds(back.read(f"{COLLECTIONS}/{last}"))


def _number(name: str) -> int:
    text = name.removesuffix(".json")
    return int(text) if text.isdigit() else 0


def _document(until: float) -> bytes:
    return json.dumps({"until": until}).encode()


def _holds(data: bytes | None) -> bool:
    if data is None:
        return False
    try:
        return float(json.loads(data)["until"]) + MARGIN.total_seconds() > clock.now()
    except (ValueError, LookupError, TypeError):  # not ours: whatever it is, it does not end by itself
        return True
