"""The store: trees, and what is found by name: results of stages, releases, pins and the status of runs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from trimtab.base.errors import Damaged, InputError
from trimtab.store import leases
from trimtab.store.address import canonical, check_name, folder_of, is_name, split_release, split_tree
from trimtab.store.local import LocalBack
from trimtab.store.tree import Tree
from trimtab.store.trees import Trees, canonical_json

_KEY = re.compile(r"[0-9a-f]{64}")


def open_store(address: str) -> Store:
    """Returns the store at `s3://bucket/prefix`, `file:///some/folder` or `/some/folder`; contacts nothing.

    S3's endpoint and credentials come from the environment: AWS_ENDPOINT_URL (http or https; default
    https://s3.amazonaws.com), AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION.

    Raises:
        InputError: the address or the endpoint is not valid, or the credentials are not set.
    """
    address = canonical(address)
    if not address.startswith("s3://"):
        return Store(LocalBack(folder_of(address)))
    from trimtab.store.s3 import S3Back

    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    return Store(S3Back(bucket, prefix))


class Store(Trees):
    """Immutable, content-addressed trees; the results of stages by key; numbered releases.

    Layout: `blobs/<first two digits>/<SHA-256>`, `trees/<digest>.json` (the manifest, written last: what is
    half written is never visible), `index/<key>.json`, `releases/<name>/<version>.json`, `pins/<name>.json`,
    `status/<run>/<what>.json` for those who watch; `leases/` and `collecting/` say who is at work; in a folder also
    `.lock` and, for temporary files, `.partial/`. Threads and processes may share a store.

    Every method raises StoreError when the store fails (network, disk, a damaged object) and InputError when
    something given is wrong (address, credentials, permissions, arguments).
    """

    def record(self, key: str, value: Mapping[str, Any]) -> None:
        """Keeps the result of a stage (small JSON) under its key (64 hex digits); the last writer wins."""
        data = canonical_json(value, "a result")
        self._back.prepare()
        self._back.write(f"index/{_index_key(key)}.json", data)

    def lookup(self, key: str) -> dict[str, Any] | None:
        """Returns the result recorded under a key; None when there is none, or a tree it names is gone."""
        data = self._back.read(f"index/{_index_key(key)}.json")
        try:
            value = json.loads(data) if data is not None else None
        except ValueError:
            return None
        return value if all(self._exists(*where) for where in _trees(value)) else None

    def forget(self, key: str) -> None:
        """Removes what is recorded under a key, if anything is; trees that it names stay until they are collected."""
        self._back.remove(f"index/{_index_key(key)}.json")

    def write_status(self, run: str, what: str, value: Any) -> None:
        """Keeps what a run says of itself (small JSON) for those who watch it; the last writer wins.

        Args:
            run: the id of the run, of letters, digits, '.', '_' and '-'.
            what: a name for it, likewise.
        """
        data = canonical_json({"value": value}, "a status")
        self._back.prepare()
        self._back.write(self._status(run, what), data)

    def status(self, run: str, what: str) -> Any:
        """Returns what `write_status` kept last; None when there is nothing, or something else wrote it."""
        data = self._back.read(self._status(run, what))
        try:
            return json.loads(data)["value"] if data is not None else None
        except (ValueError, LookupError, TypeError):
            return None

    def release(self, name: str, record: Mapping[str, Any] | Callable[[str], Mapping[str, Any]]) -> str:
        """Adds a release and returns its URI, `<store>/releases/<name>/<version>`.

        The version is one more than the highest, in six digits; two writers never take the same one.

        Args:
            record: JSON, or a function of the version that returns it, for a record that holds its own version.
        """
        make = record if callable(record) else lambda _version: record

        number = max((int(version) for version in self._versions(name, withdrawn=True)), default=0) + 1
        while True:
            made = make(f"{number:06d}")  # which may put trees, so no lease is held meanwhile
            data = canonical_json(made, "a release")
            with leases.working(self._back) as lease:
                for address, digest in set(_trees(made)):
                    if canonical(address) == self.uri:
                        self._renew(digest, lease)  # until the record is there, nothing else keeps an old one
                if self._back.create(f"releases/{name}/{number:06d}.json", data, before=lease.until):
                    return f"{self.uri}/releases/{name}/{number:06d}"
            number += 1

    def withdraw(self, uri: str, reason: str) -> None:
        """Takes a release back: it is no longer listed or served, its version is not given again, and what it alone
        refers to may be collected. A second time changes nothing.

        Raises:
            InputError: there is no such release in this store.
        """
        record = self.read_release(uri)
        _, name, version = split_release(uri)
        said = {"withdrawn": datetime.now(UTC).isoformat(timespec="seconds"), "reason": reason}
        artifact = str((record.get("artifact") or {}).get("digest"))
        said["artifact"] = artifact[:12]  # a whole digest would keep its tree
        self._back.create(f"releases/{name}/{version}.withdrawn.json", canonical_json(said, "a withdrawal"))
        self._back.remove(f"releases/{name}/{version}.json")

    def withdrawn(self, name: str) -> dict[str, dict[str, Any]]:
        """Returns what is known of the withdrawn releases of this name, by version: when, why, and the artifact's
        first digits."""
        found = set(self._versions(name, withdrawn=True)) - set(self._versions(name))
        read = {version: self._back.read(f"releases/{name}/{version}.withdrawn.json") for version in sorted(found)}
        return {version: json.loads(data) for version, data in read.items() if data}

    def names(self) -> list[str]:
        """Returns the names under which there are releases, sorted."""
        keys = (entry.key.split("/") for entry in self._back.entries("releases"))
        return sorted({parts[1] for parts in keys if len(parts) == 3})

    def pinned(self, prefix: str) -> dict[str, list[str]]:
        """Returns the digests of the trees of each pin whose name begins so."""
        names = [name.removesuffix(".json") for name in self._back.names("pins") if name.startswith(prefix)]
        return {name: json.loads(self._back.read(f"pins/{name}.json") or b"{}").get("trees", []) for name in names}

    def newest(self, name: str) -> str | None:
        """Returns the URI of the newest release of this name, None when there is none; reads no record."""
        versions = self._versions(name)
        return f"{self.uri}/releases/{name}/{versions[-1]}" if versions else None

    def releases(self, name: str) -> list[dict[str, Any]]:
        """Returns [{"uri", "version", "record"}, …] of all releases of this name, oldest first."""
        uris = [(f"{self.uri}/releases/{name}/{version}", version) for version in self._versions(name)]
        return [{"uri": uri, "version": version, "record": self.read_release(uri)} for uri, version in uris]

    def read_release(self, uri: str) -> dict[str, Any]:
        """Returns the record of a release.

        Raises:
            InputError: there is no such release in this store.
            Damaged: it is not as `release` wrote it.
        """
        parts = split_release(uri)
        if not parts or not is_name(parts[1]) or canonical(parts[0]) != self.uri:
            valid = f"{self.uri}/releases/<name>/<version>"
            raise InputError(f"{uri!r} is not a release of this store: write {valid}")
        data = self._back.read(f"releases/{parts[1]}/{parts[2]}.json")
        if data is None:
            if parts[2] in (withdrawn := self.withdrawn(parts[1])):
                said = withdrawn[parts[2]]
                raise InputError(f"the release {uri} was withdrawn on {said['withdrawn'][:10]}: {said['reason']}")
            versions = ", ".join(self._versions(parts[1])[-5:]) or "none"
            raise InputError(f"there is no release {uri} (the latest are: {versions})")
        try:
            record = json.loads(data)
        except ValueError:
            raise Damaged(f"the release {uri} is damaged: it is not JSON") from None
        if not isinstance(record, dict) or canonical_json(record, "a release") != data:
            raise Damaged(f"the release {uri} is damaged: it was written by something else")
        return record

    def pin(self, name: str, trees: Iterable[Tree | str], until: datetime | None = None) -> None:
        """Keeps trees, and what their documents name, from being collected: those that a schedule will ask for.

        Args:
            name: whose trees they are, as a release's name; an earlier pin of this name is replaced.
            until: when the pin may be forgotten; None for never.

        Raises:
            InputError: the name is not valid, `until` has no time zone, or not trees of this store.
            Damaged: one of them is not there.
        """
        if until and until.tzinfo is None:
            raise InputError(f"until: {until} has no time zone; write datetime.now(UTC) and so on")
        trees = list(trees)

        def add(lease: leases.Right) -> None:
            kept = [self.manifest(tree).digest for tree in trees]
            pinned = {"trees": kept, "until": until.isoformat() if until else None}
            key = f"pins/{check_name(name, 'pin')}.json"
            self._back.write(key, canonical_json(pinned, "a pin"), before=lease.until)

        leases.under_lease(self._back, add)

    def unpin(self, name: str) -> None:
        """Forgets a pin, if there is one."""
        self._back.remove(f"pins/{check_name(name, 'pin')}.json")

    def _exists(self, address: str, digest: str) -> bool:
        """Tells whether a tree is in the store at this address, and keeps an old one from being collected."""
        return (self if canonical(address) == self.uri else open_store(address))._keep(digest)

    def _status(self, run: str, what: str) -> str:
        return f"status/{check_name(run, 'run')}/{check_name(what, 'status')}.json"

    def _versions(self, name: str, withdrawn: bool = False) -> list[str]:
        """The versions of a release, oldest first; with `withdrawn` also those that are taken back."""
        names = {entry.removesuffix(".json") for entry in self._back.names(f"releases/{check_name(name, 'release')}")}
        if withdrawn:
            names = {entry.removesuffix(".withdrawn") for entry in names}
        return sorted((entry for entry in names if entry.isdigit()), key=int)


def _index_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise InputError(f"the key {key!r} is not valid: it must be 64 hex digits")
    return key


def _trees(value: Any) -> Iterator[tuple[str, str]]:
    """Yields (store, digest) of every tree that a JSON value names."""
    if isinstance(value, dict):
        uri = value.get("uri")
        parts = split_tree(uri) if isinstance(uri, str) and "digest" in value else None
        if parts:
            yield parts
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _trees(item)
