"""The papers that travel with a released model, for other tools to read and check.

| file | what it is | who reads it |
|---|---|---|
| `README.md` | the model card | people, and the Hugging Face hub |
| `bom.cdx.json` | the bill of materials, CycloneDX 1.6 | scanners |
| `provenance.intoto.json` | SLSA's provenance v1, in a signed DSSE envelope | `slsa-verifier`, policies |
| `model.sig` | the signature of the artifact's files and of the papers above | `model_signing verify` |

Their tree stands in the release's statement. `trimtab pull` lays them beside the artifact's files.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.base import signing
from trimtab.base.errors import NotVerified
from trimtab.loop.decisions import facts_of
from trimtab.model.licence import LICENCE
from trimtab.release import bom, build_provenance, model_card, model_signature
from trimtab.release.task_scores import damage, task_scores
from trimtab.store import Store, Tree

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, Key

CARD, BOM, PROVENANCE = "README.md", "bom.cdx.json", "provenance.intoto.json"


def write(
    store: Store, name: str, version: str, evidence: Mapping[str, Any], signer: CryptoSigner | None
) -> Tree:
    """Stores the papers of a release; `model.sig` is among them where the key is of a kind that signs models."""
    issued = datetime.now(UTC).replace(microsecond=0)
    artifact = store.tree(evidence["export"]["digest"])
    files = _checksums(store, artifact)
    scores = task_scores(store, evidence)
    model = store.tree(evidence["model"]["digest"])
    architecture, licence = facts_of(store, model).architecture, store.manifest(model).metadata.get(LICENCE, {})
    made = build_provenance.statement(name, evidence, files, issued)
    written = {
        CARD: model_card.card(
            name, version, evidence, architecture, scores, licence, damage(store, evidence)
        ).encode(),
        BOM: _json(bom.bom(name, version, evidence, architecture, files, scores, issued, licence)),
        PROVENANCE: _json(signing.seal(json.dumps(made, sort_keys=True).encode(), signer)),
    }
    if signer and model_signature.can_sign(signer):
        signed = files | {path: hashlib.sha256(data).hexdigest() for path, data in written.items()}
        written[model_signature.FILE] = model_signature.sign(f"{name}-{version}", signed, signer)
    with tempfile.TemporaryDirectory(prefix="trimtab-papers-") as folder:
        for path, data in written.items():
            (Path(folder) / path).write_bytes(data)
        return store.put(folder, kind="papers")


def check(
    store: Store, name: str, version: str, papers: Tree, artifact: Tree, keys: Sequence[Key] = ()
) -> list[str]:
    """Checks the signatures in the papers and that they are of this artifact; returns the names of the papers.

    Raises:
        NotVerified: one is of something else, or not signed by one of the keys.
    """
    files, found = _checksums(store, artifact), _checksums(store, papers)
    said = json.loads(signing.unseal(json.loads(store.read(papers, PROVENANCE)), keys))
    if {subject["name"]: subject["digest"]["sha256"] for subject in said["subject"]} != files:
        raise NotVerified("its provenance is of other files")
    listed = json.loads(store.read(papers, BOM))["metadata"]["component"]
    if listed["hashes"][0]["content"] != artifact.digest:
        raise NotVerified("its bill of materials is of another model")
    if model_signature.FILE in found:
        others = {path: digest for path, digest in found.items() if path != model_signature.FILE}
        data = store.read(papers, model_signature.FILE)
        model_signature.check(data, f"{name}-{version}", files | others, keys)
    return sorted(found)


def _checksums(store: Store, tree: Tree) -> dict[str, str]:
    return {path: blob.sha256 for path, blob in store.manifest(tree).files.items()}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
