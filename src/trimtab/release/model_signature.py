"""A model signature as the OpenSSF Model Signing project has it, which `model_signing verify` and others check.

A Sigstore bundle with a DSSE envelope, whose in-toto statement names every file of a folder and its SHA-256
(https://github.com/ossf/model-signing-spec). The store knows these digests, so no file is read again. It is signed with
the gate's own key, which that project takes on the curves P-256, P-384 and P-521.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trimtab.base import signing
from trimtab.base.errors import NotVerified

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, Key

#: The file of the signature, which it does not name itself.
FILE = "model.sig"
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PREDICATE = "https://model_signing/signature/v1.0"


def can_sign(signer: CryptoSigner) -> bool:
    """Whether a key is of a kind that model signatures are made with."""
    return signer.public_key.keytype == "ecdsa"


def sign(name: str, files: Mapping[str, str], signer: CryptoSigner) -> bytes:
    """Returns the content of `model.sig` for a folder with these files, path -> SHA-256."""
    envelope = signing.seal(json.dumps(_statement(name, files)).encode(), signer)
    hint = hashlib.sha256(signing.to_pem(signer.public_key).encode()).hexdigest()
    bundle = {
        "mediaType": _BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": envelope,
    }
    return json.dumps(bundle, indent=1).encode()


def check(data: bytes, name: str, files: Mapping[str, str], keys: Sequence[Key]) -> None:
    """Checks that a signature is of exactly these files and, where keys are given, by one of them.

    Raises:
        NotVerified: it is not.
    """
    try:
        envelope = json.loads(data)["dsseEnvelope"]
    except (ValueError, LookupError, TypeError):
        raise NotVerified("its model signature is damaged") from None
    if json.loads(signing.unseal(envelope, keys)) != _statement(name, files):
        raise NotVerified("its model signature is of other files")


def _statement(name: str, files: Mapping[str, str]) -> dict[str, Any]:
    ordered = sorted(files.items(), key=lambda item: item[0].split("/"))
    total = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in ordered)).hexdigest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": total}}],
        "predicateType": _PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [FILE],
            },
            "resources": [{"name": path, "algorithm": "sha256", "digest": digest} for path, digest in ordered],
        },
    }
