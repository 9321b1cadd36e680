"""The commands releases and pull: what they print, what they write, and what they refuse."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from releases import Released

from trimtab.components.deployment.rollout import delivery
from trimtab.components.deployment.rollout.settings import Rollout
from trimtab.store import open_store
from trimtab.store.garbage import collect


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Three releases of one artifact; the working directory is beside the store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    made = Released(open_store("trimtab-store"), tmp_path)
    for _ in range(2):
        made.store.release("tiny", made.record)
    return made


def test_listed(released, trimtab):
    code, said = trimtab("releases")
    assert code == 0 and [word for word in said.split() if word.startswith("tiny/")] == [
        "tiny/000003", "tiny/000002", "tiny/000001",
    ]  # fmt: skip
    assert f"signed with {released.key.keyid[:12]}" in said and "fit_larger_model: recovery " in said
    assert trimtab("releases", "tiny/000002")[1].startswith("tiny/000002")
    assert "there is no release" in trimtab("releases", "other")[1]
    assert "there is no release" in trimtab("releases", "--store", "elsewhere")[1]


def test_pulled(released, trimtab, tmp_path):
    code, said = trimtab("pull", "tiny", "pulled", "--key", "gate.pub")
    assert code == 0, said
    assert f"pulled {released.store.uri}/releases/tiny/000003 into pulled: 6 files" in said
    names = {path.name for path in (tmp_path / "pulled").iterdir()}
    assert names == {
        "config.json", "model.safetensors", "README.md", "bom.cdx.json", "provenance.intoto.json", "model.sig",
    }  # fmt: skip
    assert (tmp_path / "pulled/model.safetensors").read_bytes() == bytes(range(256)) * 4
    assert (tmp_path / "pulled/README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    (tmp_path / "pulled/config.json").write_text("{}")  # it is the user's own
    assert trimtab("verify", "tiny", "--key", "gate.pub")[0] == 0
    code, said = trimtab("pull", "tiny", "pulled")
    assert code == 2 and "folder: 'pulled' is there already; write a new folder" in said


def test_what_does_not_verify_is_not_pulled(released, trimtab, tmp_path):
    trimtab("keygen", "other")
    code, said = trimtab("pull", "tiny", "pulled", "--key", "other.pub")
    assert code == 5 and "signed by another key" in said and not (tmp_path / "pulled").exists()


def test_a_cache_that_was_altered_is_noticed(released, trimtab, tmp_path):
    path = released.store.get(released.run.state.trees["export"]) / "model.safetensors"
    path.parent.chmod(0o755)
    path.unlink()
    path.write_bytes(b"other weights")
    code, said = trimtab("pull", "tiny", "pulled")
    assert code == 4 and "model.safetensors is not what was released: empty the cache" in said


def test_withdrawn(released, trimtab):
    code, said = trimtab("releases", "tiny/000003", "--withdraw", "--reason", "it answers in French")
    assert (code, said) == (0, f"withdrawn {released.store.uri}/releases/tiny/000003")
    assert "tiny/000003 withdrawn on " in trimtab("releases")[1]
    assert trimtab("verify", "tiny")[1].startswith(f"verified {released.store.uri}/releases/tiny/000002")
    code, said = trimtab("verify", "tiny/000003")
    assert code == 2 and "was withdrawn on" in said and "it answers in French" in said
    assert released.store.release("tiny", released.record).endswith("000004")


def test_the_newest_are_kept(released, trimtab):
    code, said = trimtab("releases", "tiny", "--withdraw", "--keep", "1")
    assert code == 0 and said.count("withdrawn ") == 2
    assert released.store.newest("tiny").endswith("000003") and len(released.store.releases("tiny")) == 1
    kinds = collect(released.store, now=datetime.now(UTC) + timedelta(days=30)).kinds
    assert kinds.get("papers") == 2 and "export" not in kinds


def test_what_serves_is_never_withdrawn(released, trimtab):
    rollout = {"service": "chat", "namespace": "serving", "image": "a/b:1", "command": ["run"], "loader": "a/c:1"}
    delivery.remember(released.store, Rollout.parse(json.dumps(rollout)), released.evidence["export"]["digest"])
    assert "serves serving.chat" in trimtab("releases")[1]
    code, said = trimtab("releases", "tiny/000001", "--withdraw")
    assert code == 2 and "serves serving.chat; roll out another one first" in said
    assert trimtab("releases", "tiny", "--withdraw", "--keep", "1") == (0, "")
    assert len(released.store.releases("tiny")) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--withdraw"], "name: is missing; write the release to withdraw, NAME/VERSION, or NAME with --keep N"),
        (["tiny", "--withdraw"], "release: 'tiny' has several versions; write tiny/VERSION"),
        (["tiny", "--keep", "1"], "keep: 1 keeps nothing by itself; write --withdraw with it"),
        (["tiny", "--withdraw", "--keep", "0"], "keep: 0 is not valid; write 1 or more"),
        (["tiny/000009", "--withdraw"], "there is no release"),
    ],
)
def test_bad_input(released, trimtab, options, message):
    code, said = trimtab("releases", *options)
    assert (code, message in said) == (2, True), said
