"""The store: disks without room, and what a killed process leaves on one."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import tempfile

import pytest
from trees import KEY, child, fill, is_clean, is_local

from trimtab.base.errors import StoreError, TrimtabError
from trimtab.base.transient import POD
from trimtab.store import open_store

# ----------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("limit", [1 << 20])
def test_full_disk(store, tmp_path, limit):
    """A real limit on the size of a file, in a process of its own: writes fail in the middle."""
    folder = fill(tmp_path / "in", {"big": random.Random(1).randbytes(8 << 20), "small": b"1"})
    code = """
import resource
from trimtab.base.errors import StoreError
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
store = open_store(sys.argv[1])
try:
    print(store.get(sys.argv[3]) if sys.argv[2] == "get" else store.put(sys.argv[3], kind="x").uri)
except StoreError as error:
    print("StoreError", error)
"""
    if is_local(store):
        output, _ = child(code, store.uri, "put", folder).communicate(timeout=30)
        assert output.startswith("StoreError no space left") and str(tmp_path / "store") in output
        assert not (tmp_path / "store/trees").exists()
    tree = store.put(folder, kind="x")
    process = child("import errno, os\ndef refuse(*_): raise OSError(18, 'x')\nos.link = refuse\n" + code,
                    store.uri, "get", tree.uri)  # fmt: skip
    output, _ = process.communicate(timeout=30)
    assert output.startswith("StoreError no space left") and "TRIMTAB_CACHE" in output
    assert not list((tmp_path / "cache/trees").glob("*")) and is_clean(tmp_path)
    assert store.get(tree).is_dir()


def test_no_space(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    store = open_store(tmp_path / "store")
    monkeypatch.setattr("trimtab.store.local.settle", refuse)
    for action in (lambda: store.put(fill(tmp_path / "in"), kind="x"), lambda: store.release("a", {})):
        with pytest.raises(StoreError, match="no space left .* free some"):
            action()
    assert [p for p in (tmp_path / "store").rglob("*") if p.is_file()] == []


# ------------------------------------------------------------------------------------------------------ temporary files


def test_only_abandoned_temporary_files_are_removed(tmp_path):
    import fcntl
    import socket

    host, partial = socket.gethostname(), tmp_path / "store/.partial"
    partial.mkdir(parents=True)
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = {
        "dead": f"{host}.{dead.pid}.00",
        "ours, from an earlier container": f"{host}.{os.getpid()}.00",
        "alive": f"{host}.{os.getppid()}.00",
        "another host": f"another.{dead.pid}.00",
        "locked in another container": f"{host}.{dead.pid}.01",
        "foreign": "notes",
    }
    for name in names.values():
        (partial / name).touch()
    with open(partial / names["locked in another container"], "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_store(tmp_path / "store").record(KEY, {})
    left = {what for what, name in names.items() if (partial / name).exists()}
    assert left == {"alive", "another host", "locked in another container", "foreign"}


def test_a_volume_that_a_pod_cannot_write_is_replaced_and_named(tmp_path, monkeypatch, capsys):
    """Pods run as 1000:0, and no field of theirs gives a volume to a group."""
    (tmp_path / "volume").write_text("")  # below a file nothing is written, by root neither
    store = open_store(str(tmp_path / "store"))
    tree = store.put_json("checkpoint", {"a": 1})
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "volume" / "cache"))
    monkeypatch.delenv(POD, raising=False)
    with pytest.raises(TrimtabError):  # on a machine of one's own there is somebody to correct it
        store.get(tree)
    monkeypatch.setenv(POD, "10.0.0.1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for _ in range(2):
        assert store.get(tree).is_relative_to(tmp_path / "trimtab-cache")
    said = capsys.readouterr().err
    assert said.count("cannot be written by user") == 1 and "let group 0 write to the volume" in said
