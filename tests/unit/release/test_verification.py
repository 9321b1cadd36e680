"""What makes a release unfit to be trusted: one byte, another key, its age, another release's statement."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from releases import Released

from trimtab.base import signing
from trimtab.base.errors import InputError, NotVerified, StoreError
from trimtab.release import statement
from trimtab.release.verification import verify
from trimtab.store import open_store


@pytest.fixture
def released(store, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return Released(store, tmp_path)


def test_a_release_as_it_should_be(released):
    found = released.verify()
    assert found.signed_by == released.key.keyid == released.store.read_release(released.uri)["signed_by"]
    assert found.predicate.artifact.model_dump() == released.evidence["export"]
    # The artifact's two, one each of engine, evidence and plan, three of each of four answers, two of each
    # integrity, and four papers.
    assert found.files == 27 and found.bytes > 1024
    assert verify(released.store, released.uri).signed_by is None, "without a key no signature is vouched for"


def test_in_toto(released):
    """The form that other tools read, by the specification's own names."""
    envelope = released.store.read_release(released.uri)["attestation"]
    assert set(envelope) == {"payload", "payloadType", "signatures"}
    said = json.loads(base64.b64decode(envelope["payload"]))
    manifest = (released.folder / "store/trees" / f"{released.evidence['export']['digest']}.json").read_bytes()
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert said["subject"] == [{"name": "tiny/000001", "digest": {"sha256": hashlib.sha256(manifest).hexdigest()}}]
    assert released.gate.private_bytes not in json.dumps(said).encode()


def test_in_a_copy_of_its_store(released, tmp_path):
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    shutil.rmtree(tmp_path / "store")
    copy = open_store(tmp_path / "copy")
    assert verify(copy, copy.newest("tiny"), [released.key]).files == 27


@contextlib.contextmanager
def altered(path: Path, position: int, flip: int):
    data = path.read_bytes()
    position %= len(data)
    mode = path.stat().st_mode
    path.chmod(0o644)
    try:
        path.write_bytes(data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :])
        yield
    finally:
        path.write_bytes(data)
        path.chmod(mode)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
@given(where=st.floats(0, 1, exclude_max=True), position=st.integers(0, 1 << 20), flip=st.integers(1, 255))
@example(where=0.5, position=0, flip=0x20)
def test_any_altered_byte_is_refused(released, where, position, flip):
    """Of the artifact, its manifest, the engine, the evidence, the answers, the record and the envelope in it."""
    path = released.files[int(where * len(released.files))]
    with altered(path, position, flip), pytest.raises(NotVerified, match="is refused: "):
        released.verify()


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
@given(position=st.integers(0, 1 << 20), flip=st.sampled_from([1 << n for n in range(8)]))
def test_any_altered_bit_of_the_record_is_refused(released, position, flip):
    """The envelope is the largest part of it."""
    (path,) = (released.folder / "store/releases/tiny").iterdir()
    with altered(path, position, flip), pytest.raises(NotVerified, match="is refused: "):
        released.verify()


def test_the_case_of_an_exponent_is_a_byte_too(released):
    """1e-05 and 1E-05 are the same number in JSON, and so the same digest; the bytes are not."""
    path = released.folder / "store/trees" / f"{released.evidence['export']['digest']}.json"
    with altered(path, path.read_bytes().index(b"1e-05") + 1, 0x20):
        assert b"1E-05" in path.read_bytes()
        with pytest.raises(NotVerified, match="written by something else"):
            released.verify()


@pytest.mark.parametrize("kind", ["blobs", "trees"])
def test_what_is_gone_is_refused(released, kind):
    for path in released.files:
        if path.is_relative_to(released.folder / "store" / kind):
            data = path.read_bytes()
            path.unlink()
            with pytest.raises(NotVerified, match="is missing in the store|there is no tree"):
                released.verify()
            path.write_bytes(data)


@pytest.mark.parametrize(
    ("days", "max_age", "refusal"),
    [
        (0, None, None),
        (364, None, None),
        (366, None, "its statement expired on .*: release it anew"),
        (29, 30, None),
        (31, 30, "its statement is 31.0 days old, more than 30"),
        (-1, None, "issued in the future"),
    ],
)
def test_time(released, days, max_age, refusal):
    options = {"now": datetime.now(UTC) + timedelta(days=days), "max_age": max_age and timedelta(days=max_age)}
    with pytest.raises(NotVerified, match=refusal) if refusal else contextlib.nullcontext():
        released.verify(**options)


def test_a_shorter_life(released, monkeypatch):
    monkeypatch.setenv(statement.VALID_DAYS, "7")
    uri = released.store.release("tiny", released.record)
    with pytest.raises(NotVerified, match="expired"):
        released.verify(uri, now=datetime.now(UTC) + timedelta(days=8))
    for wrong in ("0", "soon", "-1", "nan"):
        monkeypatch.setenv(statement.VALID_DAYS, wrong)
        with pytest.raises(InputError, match=f"TRIMTAB_SIGNATURE_DAYS: '{wrong}' is not valid; write a number"):
            released.statement("000003")


# --- what whoever may write to the store could try ------------------------------------------------------------


def replayed_as_a_newer_version(released):
    return released.file(released.record("000001"))


def replayed_under_another_name(released):
    return released.file(released.record("000001"), name="other")


def signed_by_the_attacker(released):
    attacker, _ = signing.generate(released.folder / "attacker")
    key = signing.signer({signing.KEY: str(released.folder / "attacker")})
    return released.file(released.signed(released.statement("000002"), by=key))


def signed_by_the_attacker_in_the_gates_name(released):
    record = released.store.read_release(signed_by_the_attacker(released))
    record["attestation"]["signatures"][0]["keyid"] = released.key.keyid
    return released.file({**record, "signed_by": released.key.keyid})


def unsigned(released):
    return released.file(released.signed(released.statement("000002"), by=None))


def without_its_signature(released):
    record = released.record("000002")
    return released.file({**record, "attestation": {**record["attestation"], "signatures": []}})


def without_a_statement(released):
    record = released.record("000002")
    del record["attestation"]
    return released.file(record)


def another_artifact(released):
    return released.file({**released.record("000002"), "artifact": released.engine.model_dump()})


def another_verdict(released):
    record = released.record("000002")
    return released.file({**record, "verdict": {**record["verdict"], "looks": 2}})


def one_more_field(released):
    return released.file({**released.record("000002"), "note": "looks good"})


def one_field_less(released):
    record = released.record("000002")
    del record["engine"]
    return released.file(record)


def one_more_signature(released):
    record = released.record("000002")
    signatures = record["attestation"]["signatures"]
    signatures.append({**signatures[0], "keyid": "0" * 64})
    return released.file(record)


def another_payload(released):
    record = released.record("000002")
    payload = base64.b64decode(record["attestation"]["payload"]).replace(b'"cpu"', b'"l4"')
    envelope = {**record["attestation"], "payload": base64.b64encode(payload).decode()}
    return released.file({**record, "attestation": envelope})


def base64_spelled_otherwise(released):
    record = released.record("000002")
    spelled = record["attestation"]["payload"] + "\n"
    return released.file({**record, "attestation": {**record["attestation"], "payload": spelled}})


@pytest.mark.parametrize(
    ("attack", "refusal"),
    [
        (replayed_as_a_newer_version, "its statement is of release tiny/000001: it is replayed"),
        (replayed_under_another_name, "its statement is of release tiny/000001: it is replayed"),
        (signed_by_the_attacker, "it is signed by another key"),
        (signed_by_the_attacker_in_the_gates_name, "its signature is not right"),
        (unsigned, "it is unsigned"),
        (without_its_signature, "it is unsigned"),
        (without_a_statement, "it carries no statement"),
        (another_artifact, "its record was altered: artifact"),
        (another_verdict, "its record was altered: verdict"),
        (one_more_field, "its record was altered: note"),
        (one_field_less, "its record was altered: engine"),
        (one_more_signature, "its envelope is damaged"),
        (another_payload, "its signature is not right"),
        (base64_spelled_otherwise, "its envelope is damaged"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_attacks(released, attack, refusal):
    uri = attack(released)
    with pytest.raises(NotVerified, match=f"^{uri} is refused: {refusal}"):
        released.verify(uri)
    assert released.verify().uri == released.uri, "the true release stands"


def test_signed_answers_that_do_not_suffice(store, tmp_path, monkeypatch):
    """A gate that signs what it should not: the stored answers are judged anew all the same."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    released = Released(store, tmp_path, lost=0.5)
    with pytest.raises(NotVerified, match="judged anew, the stored answers say: rejected"):
        released.verify()


def test_a_statement_of_something_else(released):
    envelope = signing.seal(b'{"_type": "https://in-toto.io/Statement/v0.1"}', released.gate)
    uri = released.file({"attestation": envelope})
    with pytest.raises(NotVerified, match="its statement is not one that trimtab writes"):
        released.verify(uri)


def test_no_such_release(released):
    with pytest.raises(InputError, match="there is no release"):
        released.verify(released.uri.replace("000001", "000009"))


def test_a_store_that_cannot_be_read_is_no_refusal(released, monkeypatch):
    """Trouble of the network says nothing about the release."""

    def broken(*_):
        raise StoreError("the connection broke")

    monkeypatch.setattr(released.store._back, "checksum", broken)
    with pytest.raises(StoreError, match="the connection broke"):
        released.verify()
