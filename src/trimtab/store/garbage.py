"""What nobody refers to any more, and its removal.

A tree stays when a release or a pin names it, or a document of a tree that stays (the evidence names the answers, the
calibration and the parent), or when it is young: put or looked up within `age`. What a running attempt uses is
therefore safe as long as a run is shorter than that by a day; what a schedule uses is in a release, or pinned. What
runs have said of themselves goes when it is that old. What a document names under `intermediate` it does not keep: a
release keeps what must be judged anew, and not all that it was made of.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from trimtab.base import progress
from trimtab.base.errors import Damaged, InputError
from trimtab.store import cache, clock
from trimtab.store.leases import Right, collecting
from trimtab.store.local import blob_key
from trimtab.store.store import Store
from trimtab.store.transfer import Meter, in_parallel
from trimtab.store.tree import Manifest
from trimtab.store.trees import RENEW

AGE = timedelta(days=14)
#: What was renewed just before must still be young: see `trees.RENEW`, and a day for clocks and slow puts.
LEAST_AGE = RENEW + timedelta(days=1)

#: The largest .json file of a tree that is read for the trees it names; tokenizers and weights name none.
DOCUMENT = 4 << 20

#: The field of a document whose trees it does not keep.
INTERMEDIATE = "intermediate"

_DIGEST = re.compile(rb"[0-9a-f]{64}")


@dataclass(frozen=True)
class Garbage:
    """What can go: keys of results, of runs' status, of manifests and of blobs; trees by kind.

    `bytes` is what the disk of the store gets back, of a folder in its blocks; `linked` what it does not, because
    something else has a name for the same file: the cache of a node, while a process uses the tree. `kept` are the
    trees that stay.
    """

    records: tuple[str, ...]
    statuses: tuple[str, ...]
    manifests: tuple[str, ...]
    blobs: tuple[str, ...]
    bytes: int
    linked: int
    kinds: dict[str, int]
    kept: int


def collect(store: Store, age: timedelta = AGE, dry_run: bool = False, now: datetime | None = None) -> Garbage:
    """Removes what nobody refers to and returns it; with `dry_run` only says what that would be.

    Nothing is ever half there: results go before the trees that they name, manifests before their blobs. A collection
    that is killed leaves fewer trees, all of them whole, and the next one goes on.

    Args:
        age: what is younger stays.
        now: the time to count from, the clock's by default.

    Raises:
        InputError: `age` is less than two days.
        Damaged: a release or a document of a tree that stays cannot be read, so that it is not known what it refers to.
        StoreError: others are at work in the store, or it failed.
    """
    if age < LEAST_AGE:
        remedy = f"write {LEAST_AGE.days}d or more"
        raise InputError(f"older_than: {age.days} days is too short, for a run may still use it; {remedy}")
    now = now or datetime.fromtimestamp(clock.now(), UTC)
    if dry_run:
        return _find(store, age, now, lambda: None)
    with collecting(store._back) as right:
        garbage = _find(store, age, now, right.keep_up)
        for key in garbage.manifests:  # of this node: the same files under other names
            cache.evict(_digest_in(key))
        _remove(store._back, garbage, right)
    return garbage


def _find(store: Store, age: timedelta, now: datetime, keep_up: Callable[[], None]) -> Garbage:
    back, before = store._back, (now - age).timestamp()
    listed = list(back.entries("trees"))
    modified = {_digest_in(entry.key): entry.modified for entry in listed}
    roots = {digest for digest, when in modified.items() if when >= before}
    for entry in [*back.entries("releases"), *back.entries("pins")]:
        roots |= _rooted(store, entry.key, now)
    wanted, kept = set(), set()
    todo = roots & modified.keys()
    while todo:
        kept |= todo
        progress.report("gc", "following references", len(kept), len(modified))
        found = _each(lambda digest: _references(store, digest), todo, keep_up)
        wanted |= {blob for blobs, _ in found for blob in blobs}
        todo = {digest for _, names in found for digest in names & modified.keys()} - kept
    dead = modified.keys() - kept
    kinds = Counter(_each(lambda digest: _kind(store, digest), dead, keep_up))
    records = list(back.entries("index"))
    gone = _each(lambda entry: bool(_named([back.read(entry.key)]) & dead), records, keep_up)
    records = [entry for entry, is_gone in zip(records, gone, strict=True) if is_gone]
    statuses = [entry for entry in back.entries("status") if entry.modified < before]
    old = [entry for entry in back.entries("blobs") if entry.modified < before]
    blobs = [entry for entry in old if _digest_in(entry.key) not in wanted]
    others = cache.links(dead)
    held = {entry.key for entry in blobs if entry.links - others.get(entry.identity, 0) > 1}
    removed = [*records, *statuses, *(entry for entry in listed if _digest_in(entry.key) in dead), *blobs]
    return Garbage(
        records=tuple(entry.key for entry in records),
        statuses=tuple(entry.key for entry in statuses),
        manifests=tuple(f"trees/{digest}.json" for digest in sorted(dead)),
        blobs=tuple(entry.key for entry in blobs),
        bytes=sum(entry.on_disk for entry in removed if entry.key not in held),
        linked=sum(entry.on_disk for entry in blobs if entry.key in held),
        kinds=dict(sorted(kinds.items())),
        kept=len(kept),
    )


def _rooted(store: Store, key: str, now: datetime) -> set[str]:
    """Returns what a release or a pin mentions; nothing for a pin that has ended."""
    data = store._back.read(key)
    try:
        until = json.loads(data or b"{}").get("until")  # a release has none
        ended = until is not None and datetime.fromisoformat(until) <= now
    except (ValueError, TypeError, AttributeError):
        problem = f"{store.uri}/{key} is damaged, so what it refers to is not known: nothing is removed"
        raise Damaged(problem) from None
    return set() if ended else _named([data])


def _references(store: Store, digest: str) -> tuple[set[str], set[str]]:
    """Returns the blobs of a tree, and every digest that its documents mention."""
    manifest, names = store.manifest(store.tree(digest)), set()
    for path, blob in manifest.files.items():
        if path.endswith(".json") and blob.bytes <= DOCUMENT:
            data = store._back.read(blob_key(blob.sha256))
            if data is None or hashlib.sha256(data).hexdigest() != blob.sha256:
                problem = f"the file {path!r} of {store.uri}/trees/{digest} is damaged in the store"
                raise Damaged(f"{problem}, so what it refers to is not known: nothing is removed")
            names |= _named([_without_intermediate(data)])
    return {blob.sha256 for blob in manifest.files.values()}, names


def _kind(store: Store, digest: str) -> str:
    try:
        manifest: Manifest = store.manifest(store.tree(digest))
    except Damaged:
        return "damaged"
    return manifest.kind


def _without_intermediate(data: bytes) -> bytes:
    """A document without what it says to keep nothing of."""
    if INTERMEDIATE.encode() in data:
        with contextlib.suppress(ValueError):
            document = json.loads(data)
            if isinstance(document, dict) and document.pop(INTERMEDIATE, None) is not None:
                return json.dumps(document).encode()
    return data


def _named(texts: Iterable[bytes | None]) -> set[str]:
    """Every digest in some texts. More than the trees they name, which can only keep too much."""
    return {match.decode() for text in texts if text for match in _DIGEST.findall(text)}


def _digest_in(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".json")


def _remove(back: Any, garbage: Garbage, right: Right) -> None:
    def remove(key: str) -> None:
        right.keep_up()
        back.remove(key, before=right.until)

    kinds = (garbage.records, garbage.statuses, garbage.manifests, garbage.blobs)
    total = sum(map(len, kinds))
    done = 0
    for keys in kinds:  # each kind is gone before the next begins
        _each(remove, keys, right.keep_up)
        done += len(keys)
        progress.report("gc", "removing", done, total)


def _each(work: Callable[[Any], Any], keys: Iterable[Any], keep_up: Callable[[], None]) -> list[Any]:
    """Does something with each key, eight at a time, and keeps the right to remove things up meanwhile."""
    keys, done = list(keys), []
    for start in range(0, len(keys), 1000):
        keep_up()
        done += in_parallel(work, keys[start : start + 1000], Meter(0))
    return done
