"""The papers of a release, read by the tools that they are for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from releases import Released

from trimtab.base import environment, signing
from trimtab.base.errors import NotVerified
from trimtab.release import build_provenance, model_signature, papers
from trimtab.release.statement import read
from trimtab.release.verification import verify


@pytest.fixture
def released(store, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    return Released(store, tmp_path)


@pytest.fixture
def folder(released, tmp_path):
    """The artifact's files with the papers beside them, as `trimtab pull` writes them."""
    said = read(signing.unseal(released.store.read_release(released.uri)["attestation"])).predicate
    (tmp_path / "pulled").mkdir()
    for tree in (said.artifact, said.papers):
        for path in released.store.manifest(tree).files:
            (tmp_path / "pulled" / path).write_bytes(released.store.read(tree, path))
    return tmp_path / "pulled"


def model_signing(folder, key) -> subprocess.CompletedProcess:
    pytest.importorskip("model_signing")
    signature = str(folder / model_signature.FILE)
    command = ["model_signing", "verify", "key", str(folder), "--signature", signature, "--public_key", str(key)]
    return subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)


def test_model_signing_accepts_the_folder(released, folder, tmp_path):
    done = model_signing(folder, tmp_path / "gate.pub")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout + done.stderr


@pytest.mark.parametrize("what", ["altered", "one more", "one less", "another key"])
def test_model_signing_refuses_another_folder(released, folder, tmp_path, what):
    key = tmp_path / "gate.pub"
    if what == "altered":
        (folder / "model.safetensors").write_bytes(b"other weights")
    elif what == "one more":
        (folder / "code.py").write_text("import os")
    elif what == "one less":
        (folder / papers.CARD).unlink()
    else:
        key, _ = signing.generate(tmp_path / "other")
    done = model_signing(folder, key)
    assert done.returncode == 1 and "failed" in done.stdout + done.stderr


def test_the_bill_of_materials_is_valid_cyclonedx(released, folder):
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    text = (folder / papers.BOM).read_text()
    assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found = json.loads(text)
    model = found["metadata"]["component"]
    assert model["hashes"] == [{"alg": "SHA-256", "content": released.evidence["export"]["digest"]}]
    (base,) = (part for part in found["components"] if part["bom-ref"] == "base-model")
    assert base["hashes"][0]["content"] == released.evidence["model"]["digest"]
    kinds = {part["type"] for part in found["components"]}
    assert kinds == {"machine-learning-model", "data", "library"}
    assert {part["name"] for part in found["components"]} >= {"trimtab", "trimtab_suite"}
    assert {metric["slice"] for metric in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]} >= {
        "trimtab_antonyms"
    }
    (recipe,) = (prop["value"] for prop in model["properties"] if prop["name"] == "trimtab:recipe")
    assert json.loads(recipe) == released.evidence["recipe"]


LICENCES = [
    ({"id": "apache-2.0"}, {"id": "Apache-2.0"}, "Apache-2.0"),
    ({"id": "other", "name": "llama3.1", "link": "https://example.org/l"},
     {"name": "llama3.1", "url": "https://example.org/l"}, "llama3.1"),
    ({"id": "gemma"}, {"name": "gemma"}, "gemma"),
    ({}, None, "unknown, for neither its card nor its config names one"),
]  # fmt: skip


@pytest.mark.parametrize(("licence", "said", "told"), LICENCES, ids=[told[:12] for *_, told in LICENCES])
def test_the_licence_of_the_base_model_is_in_the_papers(licence, said, told, store, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    run = Released(store, tmp_path, licence=licence)
    tree = read(signing.unseal(store.read_release(run.uri)["attestation"])).predicate.papers
    text = store.read(tree, papers.BOM).decode()
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found = json.loads(text)
    (base,) = (part for part in found["components"] if part["bom-ref"] == "base-model")
    for model in (base, found["metadata"]["component"]):
        assert model.get("licenses") == ([{"license": said}] if said else None)
    assert ("licence is unknown" in base["description"]) is not bool(licence)
    _, front, card = store.read(tree, papers.CARD).decode().split("---\n", 2)
    assert yaml.safe_load(front).get("license") == licence.get("id") and f"that of this model: {told}." in card


def test_the_provenance_names_images_versions_and_commit(store, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_COMMIT", "c0ffee" * 6 + "c0de")
    monkeypatch.setenv("TRIMTAB_IMAGE", "registry.example/trimtab-cpu@sha256:1")
    run = Released(store, tmp_path, images="registry.example/cuda:1 registry.example/trtllm:2")
    tree = read(signing.unseal(store.read_release(run.uri)["attestation"])).predicate.papers
    said = json.loads(signing.unseal(json.loads(store.read(tree, papers.PROVENANCE)), [run.key]))
    assert said["predicateType"] == build_provenance.PREDICATE
    assert {subject["name"] for subject in said["subject"]} == {"config.json", "model.safetensors"}
    build, details = said["predicate"]["buildDefinition"], said["predicate"]["runDetails"]
    assert build["externalParameters"]["recipe"] == run.evidence["recipe"]
    dependencies = build["resolvedDependencies"]
    assert {"name": "base model", "digest": {"sha256": run.evidence["model"]["digest"]}} in dependencies
    assert {"name": "trimtab", "digest": {"gitCommit": "c0ffee" * 6 + "c0de"}} in dependencies
    uris = {item.get("uri") for item in dependencies}
    assert {"registry.example/cuda:1", "registry.example/trtllm:2"} <= uris
    assert f"pkg:pypi/trimtab@{environment.versions()['trimtab']}" in uris
    assert details["builder"]["id"] == "registry.example/trimtab-cpu@sha256:1"


def test_the_card_is_one_of_the_hub(released, folder):
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard((folder / papers.CARD).read_text())
    assert card.data.library_name == "transformers" and "trimtab" in card.data.tags
    results = {result.dataset_type: result.metric_value for result in card.data.eval_results}
    items = [
        json.loads(line)
        for line in released.store.read(released.run.measured["look-1"], "items.jsonl").decode().splitlines()
    ]
    own = [item["score"] for item in items if item["id"].startswith("trimtab_antonyms/")]
    assert results["trimtab_antonyms"] == pytest.approx(sum(own) / len(own), abs=1e-4)
    text = card.text
    recipe = text.partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(recipe) == released.evidence["recipe"]
    for part in ("recovery", "On 960 items that no look had used", "## What this must not be used to claim", "95 %"):
        assert part in text
    assert "trimtab pull STORE/releases/tiny/000001" in text


def swapped(released, **others):
    """A release whose papers are of something else, signed by the gate all the same."""
    said = released.statement("000002")
    other = released.store.put_json("export", {"other": True})
    evidence = {**released.evidence, "export": other.model_dump()}
    tree = papers.write(released.store, "tiny", "000002", evidence, others.get("signer", released.gate))
    predicate = said.predicate.model_copy(update={"papers": tree})
    return released.file(released.signed(said.model_copy(update={"predicate": predicate})))


def test_papers_of_another_artifact(released):
    with pytest.raises(NotVerified, match="its provenance is of other files"):
        released.verify(swapped(released))


def test_papers_that_nobody_signed(released):
    said = released.statement("000002")
    tree = papers.write(released.store, "tiny", "000002", released.evidence, None)
    predicate = said.predicate.model_copy(update={"papers": tree})
    uri = released.file(released.signed(said.model_copy(update={"predicate": predicate})))
    with pytest.raises(NotVerified, match="it is unsigned"):
        released.verify(uri)
    assert verify(released.store, uri).papers == (papers.CARD, papers.BOM, papers.PROVENANCE)


def test_what_verify_tells_of(released):
    assert set(released.verify().papers) == {papers.CARD, papers.BOM, papers.PROVENANCE, model_signature.FILE}
