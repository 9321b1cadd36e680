"""Whether a release may be trusted: signed, still valid, bound to its name, whole, and accepted when judged anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from trimtab.base import progress, signing
from trimtab.base.errors import Damaged, NotVerified, StoreError, TrimtabError
from trimtab.base.schema import digest
from trimtab.loop import evidence
from trimtab.release import judgement, papers, statement
from trimtab.release.statement import Predicate
from trimtab.store import Store
from trimtab.store.address import split_release

if TYPE_CHECKING:
    from securesystemslib.signer import Key


@dataclass(frozen=True)
class Verified:
    """A release that passed: `predicate` is what was signed; `files` and `bytes` were hashed again in the store.

    `signed_by` is the id of a key that was given and has signed it, None where no key was given. `measured_by` is the
    id of the key that validation has signed all the answers with, None where they are not signed; `papers` are those
    that travel with it. `keys_recomputed` is False where another version of trimtab made the keys of the answers.
    """

    uri: str
    predicate: Predicate
    signed_by: str | None
    files: int
    bytes: int
    measured_by: str | None = None
    papers: tuple[str, ...] = ()
    keys_recomputed: bool = True


def verify(
    store: Store,
    uri: str,
    keys: Sequence[Key] = (),
    max_age: timedelta | None = None,
    now: datetime | None = None,
    validation_keys: Sequence[Key] = (),
) -> Verified:
    """Checks a release against everything that can be known without a network but the store's.

    Every tree is looked up by its digest in this store, so a release may be checked in a copy of its store.

    Args:
        uri: `<store>/releases/<name>/<version>` of this store.
        keys: the public keys of which one must have signed it; without any, a signature is neither asked for nor
            checked, and the rest only shows that nothing was damaged by accident.
        max_age: how long ago it may have been signed at most.
        now: the time to judge by, the clock's by default.
        validation_keys: the public keys of which validation must have signed the answers with one; without any, a
            signature of theirs is checked against the key that the evidence names, which the gate has signed.

    Raises:
        NotVerified: it must not be used; the message says why.
        InputError: there is no such release.
        StoreError: the store could not be read.
    """
    try:
        predicate, signed_by = _proven(store, uri, keys)
        statement.check_time(predicate, now or datetime.now(UTC), max_age)
        files, size = _whole(store, predicate)
        _accepted(store, predicate)
        measured_by = judgement.signed_by(predicate.evidence)
        if validation_keys and measured_by not in {key.keyid for key in validation_keys}:
            raise NotVerified("its answers are not signed with the key of validation that was given")
        carried = _papers(store, predicate, keys)
    except (NotVerified, Damaged) as error:
        raise NotVerified(f"{uri} is refused: {error}") from None
    recomputed = judgement.is_keyed_here(predicate.evidence)
    return Verified(uri, predicate, signed_by, files, size, measured_by, carried, recomputed)


def _proven(store: Store, uri: str, keys: Sequence[Key]) -> tuple[Predicate, str | None]:
    """Returns what was signed, of this release and no other, after comparing the rest of the record with it."""
    record = store.read_release(uri)
    envelope = record.get("attestation")
    if envelope is None:
        raise NotVerified("it carries no statement: release it anew with this version of trimtab")
    predicate = statement.read(signing.unseal(envelope, keys)).predicate
    _, name, version = split_release(uri)
    if (predicate.name, predicate.version) != (name, version):
        raise NotVerified(f"its statement is of release {predicate.name}/{predicate.version}: it is replayed")
    expected = statement.release_record(envelope)
    for field in sorted(expected.keys() | record.keys()):
        said, proven = ([document[field]] if field in document else [] for document in (record, expected))
        if digest(said) != digest(proven):
            raise NotVerified(f"its record was altered: {field} is not what its statement says")
    return predicate, record["signed_by"] if keys else None


def _whole(store: Store, predicate: Predicate) -> tuple[int, int]:
    """Hashes the artifact, its engine, its evidence and the stored answers again; returns the files and bytes."""
    digests = list(dict.fromkeys(tree.digest for tree in predicate.trees))
    files = size = 0
    for number in progress.track(range(len(digests)), "verify", "hashing trees again", len(digests)):
        manifest = store.examine(store.tree(digests[number]))
        files, size = files + len(manifest.files), size + manifest.size
    return files, size


def _papers(store: Store, predicate: Predicate, keys: Sequence[Key]) -> tuple[str, ...]:
    """Checks the papers that travel with the release; a release of an earlier version has none."""
    if predicate.papers is None:
        return ()
    here = [store.tree(tree.digest) for tree in (predicate.papers, predicate.artifact)]
    try:
        return tuple(papers.check(store, predicate.name, predicate.version, *here, keys))
    except (ValueError, LookupError, TypeError) as error:
        raise NotVerified(f"its papers cannot be read ({error})") from None


def _accepted(store: Store, predicate: Predicate) -> None:
    """Judges the stored answers as the gate did."""
    try:
        if evidence.read(store, store.tree(predicate.evidence_tree.digest)) != predicate.evidence:
            raise NotVerified("its evidence is not the stored one")
        refusal = judgement.judge_anew(store, predicate.evidence)
    except (NotVerified, StoreError):
        raise
    except (TrimtabError, LookupError, TypeError, ValueError) as error:
        raise NotVerified(f"its stored answers cannot be judged ({error})") from None
    if refusal:
        raise NotVerified(refusal)
