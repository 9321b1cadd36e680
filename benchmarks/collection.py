"""Whether any interleaving of puts, look-ups, releases and collections of garbage loses a tree.

Run: python benchmarks/collection.py [--schedules N] [--seed N]
Runs trimtab's own code of puts, leases and collections over a store in memory, several processes at a time, each
request to the store a step. Between any two steps another process may go on, time may pass (seconds or days: a machine
was suspended), a clock may jump within its margin, or a process may die. After every step each manifest that is there
must have all its files, and no tree may go that somebody put or looked up less than a day ago, or that a release names.
The last line is one JSON object.

`--broken NAME` takes a part of the protocol away, which must be noticed: `fence` has the store do what comes too late,
`lease` puts without one, `marker` lets a collection begin while another one has the store.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimtab.base import progress
from trimtab.base.errors import TrimtabError
from trimtab.store import cache, clock, garbage, leases, trees
from trimtab.store.clock import Late
from trimtab.store.local import blob_key
from trimtab.store.store import Store
from trimtab.store.tree import Entry, Tree

DAY = 86_400.0
#: What may pass between two steps, in seconds, and how often each of these passes.
PAUSES, OFTEN = (0.01, 5.0, 90.0, 400.0, 1_100.0, DAY, 3 * DAY), (60, 12, 6, 6, 6, 2, 1)
#: The files of the trees, which share some of them.
CONTENTS = {name: f"content of {name}".encode() for name in "vwxyz"}
SHAPES = {"first": "xy", "second": "yz", "third": "vx", "released": "zw"}
#: How long a tree that was used is there: `garbage.LEAST_AGE` less `trees.RENEW`, less the clocks' margins.
KEPT = (garbage.LEAST_AGE - trees.RENEW).total_seconds() - 3 * leases.MARGIN.total_seconds()


class Died(BaseException):
    """The process does nothing any more, not even clean up."""


class Lost(AssertionError):
    """A tree is not what it should be; the message says after which steps."""


class Actor(threading.Thread):
    """A process with a clock of its own, which takes its next step when it is told."""

    def __init__(self, world: World, name: str, work: Callable[[Store], None]):
        super().__init__(name=name, daemon=True)
        self.world, self.work, self.skew, self.wakes, self.is_dead = world, work, 0.0, 0.0, False
        self.turn, self.is_done, self.error = threading.Semaphore(0), False, None

    def run(self) -> None:
        self.turn.acquire()
        try:
            self.work(Store(Back(self.world, self)))
        except (TrimtabError, Died):
            pass  # a collection gives up, a process dies: neither may lose anything
        except BaseException as error:
            self.error = error
        self.is_done = True
        self.world.turn.release()

    def step(self) -> None:
        """Lets others go on before the next request."""
        self.world.turn.release()
        self.turn.acquire()
        if self.is_dead:
            raise Died


class World:
    """A store, the true time, and those who work on it."""

    def __init__(self, seed: int, broken: str = ""):
        self.random, self.broken, self.time = random.Random(seed), broken, 1e9
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.used: dict[str, float] = {}
        self.released: set[str] = set()
        self.turn, self.actors, self.steps = threading.Semaphore(0), [], []

    def begin(self) -> None:
        """Fills the store with old trees, one of them released."""
        setting = Actor(self, "setting", lambda store: None)
        setting.step = lambda: None
        local.actor = setting
        store = Store(Back(self, setting))
        for name in ("first", "second", "released"):
            tree = put(store, name)
            store.record(key_of(name), {"tree": tree.model_dump()})
        store.release("r", {"tree": store.tree(digests[("released", store.uri)]).model_dump()})
        self.time += 30 * DAY
        self.used.clear()

    def go(self) -> None:
        """Takes steps until everybody has ended."""
        for actor in self.actors:
            actor.start()
        while alive := [actor for actor in self.actors if not actor.is_done]:
            if self.random.random() < 0.1:
                self.time += self.random.choices(PAUSES, OFTEN)[0]
            ready = [actor for actor in alive if actor.wakes <= self.time]
            if not ready:
                self.time = min(actor.wakes for actor in alive)
                continue
            actor = self.random.choice(ready)
            chance = self.random.random()
            if chance < 0.01:
                margin = 0.95 * leases.MARGIN.total_seconds()
                actor.skew = self.random.uniform(-margin, margin)
            elif chance < 0.013:
                actor.is_dead = True
                self.steps.append(f"{actor.name} dies")
            actor.turn.release()
            self.turn.acquire()
            if actor.error:
                raise actor.error

    def changed(self, key: str) -> None:
        """Checks that nothing is lost by what was just done to an object."""
        there = {name[6:-5]: json.loads(self.objects[name][0]) for name in self.objects if name.startswith("trees/")}
        for digest, manifest in there.items():
            for blob in manifest["files"].values():
                if blob_key(blob["sha256"]) not in self.objects:
                    self.lose(f"the tree {digest[:8]} lacks a file after {key}")
        for digest in self.released - there.keys():
            self.lose(f"the released tree {digest[:8]} is gone after {key}")
        for digest, when in self.used.items():
            if digest not in there and self.time - when < KEPT:
                self.lose(f"the tree {digest[:8]} is gone after {key}, {(self.time - when) / 3600:.1f} h after its use")

    def lose(self, what: str) -> None:
        raise Lost(f"{what}:\n" + "\n".join(self.steps[-80:]))


class Back:
    """The back end of one process: each method is a step; as S3, it refuses what comes after its time."""

    def __init__(self, world: World, actor: Actor):
        self.world, self.actor, self.uri = world, actor, "s3://model/store"

    def _step(self, what: str, key: str, before: float | None = None) -> None:
        self.actor.step()
        self.world.steps.append(f"{self.world.time - 1e9:.1f} {self.actor.name} {what} {key[:24]}")
        if before is not None and self.world.time >= before and self.world.broken != "fence":
            raise Late("too late")

    def prepare(self) -> None: ...

    def lock(self, exclusive: bool) -> Any:
        return contextlib.nullcontext()

    def size(self, key: str) -> int | None:
        self._step("size", key)
        return len(self.world.objects[key][0]) if key in self.world.objects else None

    def read(self, key: str) -> bytes | None:
        self._step("read", key)
        return self.world.objects.get(key, (None, 0.0))[0]

    def names(self, folder: str) -> list[str]:
        self._step("list", folder)
        return sorted(key.removeprefix(f"{folder}/") for key in self.world.objects if key.startswith(f"{folder}/"))

    def modified(self, key: str) -> float | None:
        self._step("look at", key)
        self._use(key)
        return self.world.objects[key][1] if key in self.world.objects else None

    def entries(self, folder: str) -> list[Entry]:
        self._step("list", folder)
        found = [(key, value) for key, value in self.world.objects.items() if key.startswith(f"{folder}/")]
        return [Entry(key, len(data), when, len(data)) for key, (data, when) in found]

    def remove(self, key: str, before: float | None = None) -> None:
        self._step("remove", key, before)
        if self.world.objects.pop(key, None) and key.startswith(("trees", "blobs")):
            self.world.changed(key)

    def write(self, key: str, data: bytes, before: float | None = None) -> None:
        self._step("write", key, before)
        self._place(key, data)

    def create(self, key: str, data: bytes, before: float | None = None) -> bool:
        self._step("create", key, before)
        if key in self.world.objects and not (self.world.broken == "marker" and key.startswith("collecting")):
            return False
        if key.startswith("releases"):
            named = {match.decode() for match in garbage._DIGEST.findall(data)}
            self.world.released |= {digest for digest in named if f"trees/{digest}.json" in self.world.objects}
        self._place(key, data)
        return True

    def add(self, source: Path, size: int, meter: Any, move: bool) -> str:
        data = CONTENTS[source.name]
        key = blob_key(hashlib.sha256(data).hexdigest())
        meter.touch()
        if self.size(key) != size:
            self._step("send", key)
            self.world.objects[key] = (data, self.world.time)
        meter.advance(size)
        return key.rpartition("/")[2]

    def _place(self, key: str, data: bytes) -> None:
        self.world.objects[key] = (data, self.world.time)
        if key.startswith("trees"):
            self._use(key)
            self.world.changed(key)

    def _use(self, key: str) -> None:
        """Remembers when an actor last saw a tree: it counts when what it does ends well."""
        if key.startswith("trees"):
            self.actor.seen = (key[6:-5], self.world.time)


local = threading.local()
digests: dict[tuple[str, str], str] = {}
folder = Path(tempfile.mkdtemp(prefix="trimtab-collection-"))


def key_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def used(store: Store) -> None:
    """What the actor has just put or looked up counts as used from then on."""
    digest, when = store._back.actor.seen
    world = store._back.world
    if f"trees/{digest}.json" not in world.objects and world.time - when < KEPT:
        world.lose(f"the tree {digest[:8]} is not there when it is returned")
    world.used[digest] = max(when, world.used.get(digest, 0.0))


def put(store: Store, name: str) -> Tree:
    tree = store.put({letter: folder / letter for letter in SHAPES[name]}, kind="t", metadata={"name": name})
    digests[name, store.uri] = tree.digest
    used(store)
    return tree


def look_up(store: Store, name: str) -> None:
    if store.lookup(key_of(name)):
        used(store)


def release(store: Store, name: str) -> None:
    tree = put(store, name)
    store.release("r", {"tree": tree.model_dump()})


def collect(store: Store) -> None:
    garbage.collect(store, garbage.LEAST_AGE)


@contextlib.contextmanager
def in_this_world() -> Iterator[None]:
    """Puts the actors' clocks, and requests one after the other, in place of what the code has."""

    def sleep(seconds: float) -> None:
        actor = threading.current_thread()
        actor.wakes = actor.world.time + seconds
        actor.step()

    def now() -> float:
        actor = threading.current_thread()
        return actor.world.time + actor.skew if isinstance(actor, Actor) else local.actor.world.time

    def one_by_one(work: Callable[[Any], Any], items: Any, meter: Any) -> list[Any]:
        return [work(item) for item in items]

    replaced = [
        (clock, "now", now), (clock, "sleep", sleep), (leases, "POLL", 20.0), (progress, "report", lambda *_: None),
        (trees, "in_parallel", one_by_one), (garbage, "in_parallel", one_by_one),
        (cache, "links", lambda digests: Counter()), (cache, "evict", lambda digest: True),
    ]  # fmt: skip
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def schedule(seed: int, broken: str = "") -> int:
    """Runs one schedule and returns its steps; raises Lost where a tree is lost."""
    world = World(seed, broken)
    world.begin()
    chance = world.random
    works = [collect] + [collect] * (chance.random() < 0.5)
    for _ in range(chance.choice((1, 2, 2, 3))):
        name, work = chance.choice(("first", "second", "third")), chance.choice((put, put, look_up, release))
        works.append(lambda store, work=work, name=name: work(store, name))
    world.actors = [Actor(world, f"p{number}", work) for number, work in enumerate(works)]
    world.go()
    return len(world.steps)


@contextlib.contextmanager
def without(part: str) -> Iterator[None]:
    """Takes the leases away, where that is what is broken."""
    if part != "lease":
        yield
        return
    before = leases._leases
    leases._leases = lambda back: []
    try:
        yield
    finally:
        leases._leases = before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=100_000, help="how many (100000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first; each next one is one more (0)")
    parser.add_argument("--broken", default="", choices=["", "fence", "lease", "marker"])
    arguments = parser.parse_args()
    began, steps, lost = time.monotonic(), 0, ""
    with in_this_world(), without(arguments.broken):
        for number in range(arguments.schedules):
            try:
                steps += schedule(arguments.seed + number, arguments.broken)
            except Lost as error:
                lost = f"schedule {arguments.seed + number}: {error}"
                break
            if number % 10_000 == 9_999:
                print(f"{number + 1:,} schedules in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if lost:
        print(lost, file=sys.stderr)
    row = {"schedules": number + (not lost), "steps": steps, "lost": bool(lost)}
    print(json.dumps({**row, "seconds": round(time.monotonic() - began, 1)}))
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
