"""Who measured: validation signs what it has measured, with a key that no other task has.

Whoever may write to the store could file answers of their own under the key of a stage. Signed ones are validation's;
it takes nothing else for found, and the gate counts nothing else. The form is an in-toto Statement v1 in a DSSE
envelope, whose subject is the tree of the answers, named by the key of the stage that it is the result of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trimtab.base import signing
from trimtab.base.errors import NotVerified
from trimtab.store.tree import Tree

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, Key

PREDICATE = "trimtab:answers/v1"


def sign(key: str, tree: Tree, signer: CryptoSigner) -> dict[str, Any]:
    """Returns the envelope that says: this tree is the result of the stage with this key."""
    return signing.seal(_payload(key, tree), signer)


def check(envelope: Any, key: str, tree: Tree, public: Key) -> None:
    """Checks that an envelope says so, signed by that key.

    Raises:
        NotVerified: it does not.
    """
    if signing.unseal(envelope, [public]) != _payload(key, tree):
        raise NotVerified("its signature is of another result")


def is_signed(record: Mapping[str, Any], key: str, public: Key) -> bool:
    """Whether a record of the index carries that signature."""
    try:
        check(record.get("signature"), key, Tree.model_validate(record["tree"]), public)
    except NotVerified:
        return False
    return True


def _payload(key: str, tree: Tree) -> bytes:
    said = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": key, "digest": {"sha256": tree.digest}}],
        "predicateType": PREDICATE,
        "predicate": {},
    }
    return json.dumps(said, sort_keys=True).encode()
