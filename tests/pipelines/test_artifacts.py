"""A calibration is carried to another store: found by the next run, refused when damaged, never another model's."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from trimtab import stages
from trimtab.base import child
from trimtab.base.errors import InputError
from trimtab.base.schema import digest
from trimtab.components.fetch.source import fetch
from trimtab.loop.state import State
from trimtab.pipelines.commands import main
from trimtab.recipe import Recipe
from trimtab.store import open_store
from trimtab.store.tree import Manifest

RECIPE = "{calibrate: {samples: 2, length: 32}, quantize: {format: fp8, kv_cache: fp8}}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same shapes and names."""
    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "other", seed=1)


@pytest.fixture
def begin(tmp_path: Path) -> Callable[..., State]:
    """A function: the state of an attempt on a model in the store of a name."""

    def make(store: str, model: Path, recipe: str = RECIPE) -> State:
        opened = open_store(str(tmp_path / store))
        tree = fetch(str(model), opened)
        return State(store=opened.uri, goal="lower_cost", target="cpu", model=tree, recipe=Recipe.parse(recipe))

    return make


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets the work run in this process, and names what ran."""
    ran = []

    def call(work: str, **arguments) -> child.Done:
        module, _, function = work.partition(":")
        ran.append(function)
        return child.Done(getattr(importlib.import_module(module), function)(**arguments), 1.25, 1)

    monkeypatch.setattr(child, "call", call)
    return ran


@pytest.fixture
def artifact(begin, worked, model, tmp_path, monkeypatch) -> Path:
    """A calibration of the model, exported from the store `a`."""
    monkeypatch.chdir(tmp_path)
    result = stages.advance("calibrate", begin("a", model))[1]
    worked.clear()
    assert main.main(["artifact", "export", "--store", "a", result.tree.uri, "artifact"]) == 0
    return tmp_path / "artifact"


def command(capsys, *options: str) -> tuple[int, str]:
    code = main.main(["artifact", *options])
    return code, " ".join(capsys.readouterr().err.split())


def found_by_key(store: Path) -> list[Path]:
    return [*store.glob("trees/*"), *store.glob("index/*")]


def test_the_next_run_on_another_store_finds_it(artifact, begin, worked, model, tmp_path, capsys):
    moved = shutil.copytree(artifact, tmp_path / "elsewhere")
    code, said = command(capsys, "import", "--store", "b", str(moved))
    assert code == 0 and said.startswith("calibration file:")
    state, result = stages.advance("calibrate", begin("b", model))
    assert result.hit and worked == []
    assert "calibrate: found in the store" in capsys.readouterr().err
    assert result.tree.uri in said and result.seconds == 1.25
    assert result.metrics["samples"] == 2 and result.metrics["tokens"] == 64
    assert stages.advance("recalibrate", state)[1].hit
    before = {path.name: path.read_bytes() for path in (artifact / "files").iterdir()}
    assert {p.name: p.read_bytes() for p in open_store(str(tmp_path / "b")).get(result.tree).iterdir()} == before


def test_a_digest_names_the_tree_too(artifact, tmp_path, capsys):
    named = json.loads((artifact / "artifact.json").read_text())["digest"]
    assert command(capsys, "export", "--store", "a", named, "again")[0] == 0
    assert (tmp_path / "again" / "artifact.json").read_bytes() == (artifact / "artifact.json").read_bytes()


def test_a_uri_names_the_store_and_a_release_is_pulled(artifact, tmp_path, monkeypatch, capsys):
    """From any folder, as the README beside a server's files tells it."""
    uri = json.loads((tmp_path / "artifact" / "artifact.json").read_text())["digest"]
    uri = f"{open_store(str(tmp_path / 'a')).uri}/trees/{uri}"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main.main(["artifact", "export", uri, "again"]) == 0
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["again"]
    release = f"{open_store(str(tmp_path / 'a')).uri}/releases/tiny/000001"
    assert main.main(["artifact", "export", release, "out"]) == 2
    assert f"is a release; write trimtab pull {release} out" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("change", ["model", "settings"])
def test_another_model_or_other_settings_do_not_find_it(change, artifact, begin, worked, model, other, capsys):
    assert command(capsys, "import", "--store", "b", str(artifact))[0] == 0
    recipe = RECIPE.replace("samples: 2", "samples: 3") if change == "settings" else RECIPE
    state = begin("b", other if change == "model" else model, recipe)
    assert not stages.advance("calibrate", state)[1].hit
    assert worked == ["calibrate"]


@pytest.mark.parametrize(
    "recipe",
    [RECIPE, RECIPE.replace("format: fp8, kv_cache: fp8", "format: int4_rtn, kv_cache: int8"),
     "{calibrate: {samples: 2, length: 32}, prune: {method: depth, blocks: 1}}"],
)  # fmt: skip
def test_under_a_forged_key_it_is_refused_by_what_reads_it(recipe, artifact, begin, other, capsys):
    """The key is that of the other model, so the stage finds it; the fingerprint inside gives it away."""
    state = begin("b", other, recipe)
    stage = stages.STAGES["calibrate"]
    forge(artifact, stages.key_here(stage, state))
    assert command(capsys, "import", "--store", "b", str(artifact))[0] == 0
    state, result = stages.advance("calibrate", state)
    assert result.hit
    reader = "prune" if state.recipe.prune else "quantize"
    with pytest.raises(InputError, match=r"calibration: describes another model \(fingerprint [0-9a-f]{12}\) than"):
        stages.advance(reader, state)


def test_sensitivities_of_another_model_are_refused(artifact, begin, worked, model, other, tmp_path, capsys):
    recipe = "{calibrate: {samples: 2, length: 32}, quantize: {format: int8_wo, group_size: 32, exclude_sensitive: 1}}"
    state = stages.advance("calibrate", begin("a", model, recipe))[0]
    tree = stages.advance("sensitivity", state)[1].tree
    assert command(capsys, "export", "--store", "a", tree.uri, "harms")[0] == 0
    state = stages.advance("calibrate", begin("b", other, recipe))[0]
    stage = stages.STAGES["sensitivity"]
    forge(tmp_path / "harms", stages.key_here(stage, state))
    assert command(capsys, "import", "--store", "b", "harms")[0] == 0
    state, result = stages.advance("sensitivity", state)
    assert result.hit
    with pytest.raises(InputError, match="sensitivity: describes another model"):
        stages.advance("quantize", state)


def forge(artifact: Path, key: str) -> None:
    """Gives an artifact another key, and makes it agree with itself again."""
    about = json.loads((artifact / "artifact.json").read_text())
    about["key"] = about["manifest"]["metadata"]["key"] = key
    about["digest"] = Manifest.parse(about["manifest"]).digest
    (artifact / "artifact.json").write_text(json.dumps(about))


# --- damage ------------------------------------------------------------------------------------------------------


def missing(artifact: Path) -> None:
    (artifact / "files" / "tokens.safetensors").unlink()


def cut_short(artifact: Path) -> None:
    path = artifact / "files" / "statistics.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def one_bit(artifact: Path) -> None:
    path = artifact / "files" / "statistics.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def too_many(artifact: Path) -> None:
    (artifact / "files" / "more.bin").write_bytes(b"x")


def no_files(artifact: Path) -> None:
    shutil.rmtree(artifact / "files")


def not_completed(artifact: Path) -> None:
    (artifact / "artifact.json").unlink()


def half_written(artifact: Path) -> None:
    path = artifact / "artifact.json"
    path.write_text(path.read_text()[:100])


def edited(artifact: Path, change: Callable[[dict], None]) -> None:
    about = json.loads((artifact / "artifact.json").read_text())
    change(about)
    (artifact / "artifact.json").write_text(json.dumps(about))


def another_key(artifact: Path) -> None:
    edited(artifact, lambda about: about.update(key="ab" * 32))


def another_kind(artifact: Path) -> None:
    edited(artifact, lambda about: about["manifest"].update(kind="gram"))


def no_seconds(artifact: Path) -> None:
    edited(artifact, lambda about: about.pop("seconds"))


def leaves_the_folder(artifact: Path) -> None:
    def change(about: dict) -> None:
        about["manifest"]["files"]["../../outside"] = about["manifest"]["files"].pop("text.txt")
        about["digest"] = digest(about["manifest"])

    edited(artifact, change)


DAMAGE = [
    (missing, "files/tokens.safetensors is missing; copy the artifact again"),
    (cut_short, "files/statistics.safetensors is damaged: it has another checksum"),
    (one_bit, "files/statistics.safetensors is damaged: it has another checksum"),
    (too_many, "files/more.bin is no part of the artifact; remove it"),
    (no_files, "artifact/files is not a folder"),
    (not_completed, "artifact.json cannot be read (No such file or directory); write a folder that `trimtab artifact"),
    (half_written, "artifact.json is damaged"),
    (another_key, "artifact.json is damaged: it contradicts itself; export it again"),
    (another_kind, "artifact.json is damaged: it contradicts itself; export it again"),
    (no_seconds, "artifact.json is damaged: seconds: is required"),
    (leaves_the_folder, "which is not a plain path inside the tree"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_a_damaged_artifact_is_refused_whole(damage, message, artifact, tmp_path, capsys):
    damage(artifact)
    code, said = command(capsys, "import", "--store", "b", str(artifact))
    assert (code, message in said) == (2, True), said
    assert found_by_key(tmp_path / "b") == []


def test_what_is_no_result_is_not_exported(artifact, begin, model, tmp_path, capsys):
    source = begin("a", model).model
    code, said = command(capsys, "export", "--store", "a", source.uri, "x")
    assert code == 2 and "(checkpoint) is not the result of a stage; write the tree of a calibration" in said
    code, said = command(capsys, "export", "--store", "a", "ab" * 32, "x")
    assert code == 4 and f"there is no tree {'ab' * 32}" in said
    code, said = command(capsys, "export", "--store", "a", "calibration", "x")
    assert code == 2 and "is not a tree: write file://" in said
    assert not (tmp_path / "x").exists()


def test_an_export_overwrites_nothing(artifact, tmp_path, capsys):
    about = json.loads((artifact / "artifact.json").read_text())
    code, said = command(capsys, "export", "--store", "a", about["digest"], "artifact")
    assert code == 2 and "folder: 'artifact' is there already; write a new folder" in said


def test_half_a_command_is_explained(capsys):
    code, said = command(capsys)
    assert code == 2 and "ACTION" in said and "see trimtab artifact --help" in said
