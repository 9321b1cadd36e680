"""The commands verify, keygen and gc: what they print, and their exit codes."""

from __future__ import annotations

import os

import pytest
from releases import Released

from trimtab.base import signing
from trimtab.store import open_store


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A store with one signed release, by the key `gate`; the working directory is beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return Released(open_store("trimtab-store"), tmp_path).uri


def test_keygen(trimtab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = trimtab("keygen", "mine")
    assert code == 0 and "public mine.pub" in said and signing.signer({signing.KEY: "mine"})


@pytest.mark.parametrize("written", ["uri", "tiny/000001", "tiny", "trimtab-store/releases/tiny/000001"])
def test_verified(released, trimtab, written):
    release = released if written == "uri" else written
    code, said = trimtab("verify", release, "--key", "gate.pub", "--max-age", "1d")
    assert code == 0, said
    assert said.startswith(f"verified {released} artifact ")
    assert "judged accepted again" in said and "signed with " in said
    assert "measured 6 measurements, signed by nobody" in said
    assert "papers README.md, bom.cdx.json, model.sig, provenance.intoto.json" in said


def test_without_a_key(released, trimtab):
    code, said = trimtab("verify", "tiny")
    assert (code, "signed not checked, for no --key was given" in said) == (0, True)


def test_refused(released, trimtab, tmp_path):
    trimtab("keygen", "other")
    code, said = trimtab("verify", "tiny", "--key", "other.pub")
    assert code == 5 and f"trimtab: {released} is refused: it is signed by another key" in said
    assert trimtab("verify", "tiny", "--key", "other.pub", "--key", "gate.pub")[0] == 0
    code, said = trimtab("verify", "tiny", "--key", "gate.pub", "--max-age", "0h")
    assert code == 5 and "days old, more than 0: release it anew" in said
    (record,) = (tmp_path / "trimtab-store/releases/tiny").iterdir()
    record.write_bytes(record.read_bytes()[:-1])
    code, said = trimtab("verify", "tiny", "--key", "gate.pub")
    assert code == 5 and "is damaged: it is not JSON" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tiny", "--key", "none.pub"], "key: 'none.pub' cannot be read"),
        (["tiny", "--key", "gate"], "key: 'gate' is not a public key in PEM; write the .pub file"),
        (["tiny", "--max-age", "90"], "age: '90' is not valid; write days or hours, such as 90d or 12h"),
        (["tny"], "has no release 'tny'; write the URI that a run printed"),
        (["tiny/000007"], "there is no release"),
        (["tiny", "--store", "elsewhere"], "elsewhere has no release 'tiny'"),
    ],
)
def test_bad_input(released, trimtab, options, message):
    code, said = trimtab("verify", *options)
    assert (code, message in said) == (2, True), said


def test_keys_are_not_overwritten(released, trimtab):
    code, said = trimtab("keygen", "gate")
    assert (code, "write the path of a new file" in said) == (2, True)


def test_a_run_that_must_sign_and_cannot(released, trimtab, monkeypatch):
    monkeypatch.setenv(signing.REQUIRED, "")
    monkeypatch.delenv(signing.KEY, raising=False)
    code, said = trimtab("run", "--model", "model", "--require-signature")
    assert (code, "TRIMTAB_SIGNING_KEY: is not set, and releases must be signed" in said) == (2, True), said


def test_garbage(released, trimtab, tmp_path):
    """All of the release stays, whatever its age; the rest goes, after a look at what that would be."""
    store = open_store("trimtab-store")
    store.put_json("ladder", {"unused": True})
    code, said = trimtab("gc", "--dry-run")
    assert code == 0 and "would remove 0 trees, 0 results" in said and "keeping 14 trees" in said
    for path in (tmp_path / "trimtab-store").rglob("*"):
        os.utime(path, (0, 0))
    for options, word in ((["--dry-run"], "would remove"), ([], "removed")):
        code, said = trimtab("gc", "--older-than", "30d", *options)
        assert code == 0 and f"{word} 1 trees (1 ladder), 0 results freeing 0.0 MB in 1 files" in said, said
    assert trimtab("verify", "tiny", "--key", "gate.pub")[0] == 0
    code, said = trimtab("gc", "--dry-run", "--store", str(tmp_path / "another"))
    assert code == 0 and f"there is no tree in file://{tmp_path}/another; if there should be, correct --store" in said
    code, said = trimtab("gc", "--older-than", "1d")
    assert code == 2 and "older_than: 1 days is too short" in said
