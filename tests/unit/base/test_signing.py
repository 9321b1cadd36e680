"""Keys and envelopes: what signs, what is refused, and that no message shows a key."""

from __future__ import annotations

import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from trimtab.base import signing
from trimtab.base.errors import InputError, NotVerified

PAYLOAD = b'{"a": 1}'


@pytest.fixture
def keys(tmp_path):
    public, _ = signing.generate(tmp_path / "gate")
    return tmp_path / "gate", public


def test_signed_by_the_key_and_by_no_other(keys, tmp_path):
    private, public = keys
    envelope = signing.seal(PAYLOAD, signing.signer({signing.KEY: str(private)}))
    assert signing.unseal(envelope, [signing.public_key(public)]) == PAYLOAD
    assert signing.sealed_by(envelope) == signing.public_key(public).keyid
    other, _ = signing.generate(tmp_path / "other")
    assert signing.unseal(envelope, [signing.public_key(other), signing.public_key(public)]) == PAYLOAD
    with pytest.raises(NotVerified, match="signed by another key"):
        signing.unseal(envelope, [signing.public_key(other)])


def test_unsigned(keys):
    envelope = signing.seal(PAYLOAD, None)
    assert (signing.unseal(envelope), signing.sealed_by(envelope)) == (PAYLOAD, "unsigned")
    with pytest.raises(NotVerified, match="it is unsigned"):
        signing.unseal(envelope, [signing.public_key(keys[1])])


def test_a_key_in_the_environment_itself(keys):
    """As a Secret gives it."""
    assert signing.signer({signing.KEY: keys[0].read_text()}).public_key == signing.public_key(keys[1])
    assert signing.signer({}) is signing.signer({signing.KEY: ""}) is None


def test_an_encrypted_key(keys, tmp_path):
    key = load_pem_private_key(keys[0].read_bytes(), None)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open sesame")).decode()
    assert signing.signer({signing.KEY: pem, signing.PASSWORD: "open sesame"})
    for password, message in (("", "is encrypted: set"), ("wrong", "PASSWORD is wrong")):
        with pytest.raises(InputError, match=message):
            signing.signer({signing.KEY: pem, signing.PASSWORD: password})
    with pytest.raises(InputError, match="is not encrypted: unset"):
        signing.signer({signing.KEY: str(keys[0]), signing.PASSWORD: "open sesame"})


def test_a_key_of_another_kind(tmp_path):
    """One that an organisation has already, such as ECDSA's P-256."""
    key = generate_private_key(SECP256R1())
    (tmp_path / "public").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")).decode()
    envelope = signing.seal(PAYLOAD, signing.signer({signing.KEY: pem, signing.PASSWORD: "x"}))
    assert signing.unseal(envelope, [signing.public_key(tmp_path / "public")]) == PAYLOAD


def test_generated_keys_are_private_and_never_overwritten(keys):
    private, public = keys
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    with pytest.raises(InputError, match="file: .*gate' cannot be made .*write the path of a new file"):
        signing.generate(private)
    assert private.read_bytes() == before
    private.unlink()
    with pytest.raises(InputError, match=r"gate\.pub' cannot be made"):
        signing.generate(private)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("/no/such/key", "the file cannot be read .*write the path of a PEM file"),
        ("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----", "it is not a private key in PEM"),
        ("-----BEGIN secret", "it is not a private key in PEM"),
    ],
)
def test_keys_that_cannot_sign(value, message):
    with pytest.raises(InputError, match=f"^{signing.KEY}: {message}") as caught:
        signing.signer({signing.KEY: value})
    assert "c2VjcmV0" not in str(caught.value) and "secret" not in str(caught.value)


def test_keys_that_cannot_verify(keys):
    with pytest.raises(InputError, match="key: '/no/such' cannot be read"):
        signing.public_key("/no/such")
    with pytest.raises(InputError, match="is not a public key in PEM; write the .pub file"):
        signing.public_key(keys[0])


@pytest.mark.parametrize(("value", "required"), [("", False), ("0", False), ("1", True)])
def test_required(value, required):
    assert signing.is_required({signing.REQUIRED: value}) == required


def test_required_must_be_plain():
    with pytest.raises(InputError, match="TRIMTAB_REQUIRE_SIGNING: 'yes' is not valid; write 1 or 0"):
        signing.is_required({signing.REQUIRED: "yes"})
