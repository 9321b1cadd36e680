"""Keys and envelopes: a statement is signed with the gate's private key and checked with its public half.

The envelope is DSSE (https://github.com/secure-systems-lab/dsse), made and checked by securesystemslib; keys are
PEM files, P-256 as `generate` writes them, or any kind that securesystemslib signs with.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.base.errors import InputError, NotVerified

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, Key

#: The private key: PEM, or the path of a PEM file. Never a parameter, which KFP stores and shows.
KEY = "TRIMTAB_SIGNING_KEY"
PASSWORD = "TRIMTAB_SIGNING_PASSWORD"
#: The same of validation, which signs what it measures; and, for the gate, the public half of that key.
VALIDATION_KEY, VALIDATION_PASSWORD = "TRIMTAB_VALIDATION_KEY", "TRIMTAB_VALIDATION_PASSWORD"
VALIDATION_PUBLIC = "TRIMTAB_VALIDATION_PUBLIC_KEY"
#: "1" makes the gate release nothing that it cannot sign.
REQUIRED = "TRIMTAB_REQUIRE_SIGNING"

#: What the signature covers, beside the payload itself.
PAYLOAD_TYPE = "application/vnd.in-toto+json"
UNSIGNED = "unsigned"


def is_required(environment: Mapping[str, str] = os.environ) -> bool:
    """Tells whether the gate must sign.

    Raises:
        InputError: TRIMTAB_REQUIRE_SIGNING is neither 1 nor 0.
    """
    value = environment.get(REQUIRED, "")
    if value not in ("", "0", "1"):
        raise InputError(f"{REQUIRED}: '{value}' is not valid; write 1 or 0")
    return value == "1"


def signer(
    environment: Mapping[str, str] = os.environ, name: str = KEY, password_name: str = PASSWORD
) -> CryptoSigner | None:
    """Returns what signs, made from TRIMTAB_SIGNING_KEY or from another variable; None where that is not set.

    Raises:
        InputError: it is set and cannot be used; the message never quotes it.
    """
    value, password = environment.get(name, ""), environment.get(password_name, "")
    if not value:
        return None
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    try:
        pem = value.encode() if "-----BEGIN" in value else Path(value).expanduser().read_bytes()
        return CryptoSigner(load_pem_private_key(pem, password.encode() or None))
    except OSError as error:
        raise InputError(f"{name}: the file cannot be read ({error.strerror}); write the path of a PEM file") from None
    except TypeError:  # what cryptography raises for a password that is missing or superfluous
        state = "is not encrypted: unset" if password else "is encrypted: set"
        raise InputError(f"{name}: the key {state} {password_name}") from None
    except (ValueError, UnsupportedAlgorithm):
        wrong = f", or {password_name} is wrong" if password else ""
        raise InputError(f"{name}: it is not a private key in PEM{wrong}; `trimtab keygen FILE` makes one") from None


def validation_signer(environment: Mapping[str, str] = os.environ) -> CryptoSigner | None:
    """Returns what validation signs with, as `signer` does."""
    return signer(environment, VALIDATION_KEY, VALIDATION_PASSWORD)


def validation_key(environment: Mapping[str, str] = os.environ) -> Key | None:
    """Returns the public key that answers must be signed with, where the gate was given one.

    Raises:
        InputError: it is set and is no public key.
    """
    value = environment.get(VALIDATION_PUBLIC, "")
    return public_key(value) if value else None


def to_pem(key: Key) -> str:
    """Returns a public key as PEM."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    public = key.keyval["public"]
    if "-----BEGIN" in public:
        return public
    raw = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))  # which securesystemslib keeps so
    return raw.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def public_key(source: str | Path) -> Key:
    """Reads a public key: PEM, or the path of a PEM file.

    Raises:
        InputError: the file cannot be read, or holds no public key.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    try:
        pem = str(source).encode() if "-----BEGIN" in str(source) else Path(source).expanduser().read_bytes()
        return SSlibKey.from_crypto(load_pem_public_key(pem))
    except OSError as error:
        raise InputError(f"key: '{source}' cannot be read ({error.strerror}); write a public key's PEM file") from None
    except (ValueError, UnsupportedAlgorithm):
        remedy = "write the .pub file of `trimtab keygen`"
        raise InputError(f"key: '{source}' is not a public key in PEM; {remedy}") from None


def generate(path: Path) -> tuple[Path, str]:
    """Writes a key pair on the curve P-256, which signs statements and models: `path` (readable by its owner alone) and
    `path`.pub; returns the latter and its id.

    Raises:
        InputError: one of the files exists, or cannot be written.
    """
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from securesystemslib.signer import CryptoSigner

    key = ec.generate_private_key(ec.SECP256R1())
    made, public = CryptoSigner(key), path.with_name(f"{path.name}.pub")
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for target, content, mode in ((path, made.private_bytes, 0o600), (public, pem, 0o644)):
        try:
            with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
        except OSError as error:
            remedy = "write the path of a new file"
            raise InputError(f"file: '{target}' cannot be made ({error.strerror}); {remedy}") from None
    return public, made.public_key.keyid


def seal(payload: bytes, by: CryptoSigner | None) -> dict[str, Any]:
    """Returns the DSSE envelope of a payload; without a signer, one without signatures."""
    from securesystemslib.dsse import Envelope

    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    if by:
        envelope.sign(by)
    return envelope.to_dict()


def sealed_by(envelope: Mapping[str, Any]) -> str:
    """Returns the id of the key that an envelope says it is signed with, or "unsigned"; proves nothing."""
    return envelope["signatures"][0]["keyid"] if envelope["signatures"] else UNSIGNED


def unseal(envelope: Any, keys: Sequence[Key] = ()) -> bytes:
    """Returns the payload of an envelope that one of the keys has signed.

    Args:
        keys: the public keys that are trusted; none asks for the envelope's form alone.

    Raises:
        NotVerified: not an envelope, unsigned, or not signed by one of the keys.
    """
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError

    try:
        opened = Envelope.from_dict(copy.deepcopy(envelope))
        # base64 has several spellings of the same bytes; only one of them is ours.
        if opened.to_dict() != envelope or opened.payload_type != PAYLOAD_TYPE or len(opened.signatures) > 1:
            raise ValueError
    except Exception:  # of an altered envelope anything may be wrong: a type, a field, base64, hexadecimal digits
        raise NotVerified("its envelope is damaged") from None
    if keys:
        if not opened.signatures:
            raise NotVerified("it is unsigned")
        try:
            opened.verify(list(keys), threshold=1)
        except VerificationError:
            by = ", ".join(keyid[:12] for keyid in opened.signatures)
            if not {key.keyid for key in keys} & set(opened.signatures):
                raise NotVerified(f"it is signed by another key ({by}), not by the one given") from None
            raise NotVerified("its signature is not right: the statement or the signature was altered") from None
    return opened.payload
