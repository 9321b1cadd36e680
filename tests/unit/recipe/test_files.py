"""The content of local files in a stage's key."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from trimtab.recipe import Calibration, Source
from trimtab.recipe.files import with_files, without


def found(*texts: str) -> dict[str, str]:
    return with_files({}, [Source(text=text) for text in texts]).get("files", {})


def test_a_file_is_known_by_its_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    assert found(str(path)) == {str(path): hashlib.sha256(b"one").hexdigest()}
    path.write_text("two")
    assert found(str(path)) == {str(path): hashlib.sha256(b"two").hexdigest()}


def test_a_local_dataset_is_known_by_all_its_files(tmp_path):
    (tmp_path / "en").mkdir()
    files = [tmp_path / "a.jsonl", tmp_path / "en" / "b.jsonl"]
    for file in files:
        file.write_text("1")
    seen = [found(f"hf:{tmp_path}")[str(tmp_path)]]
    files[1].write_text("2")
    seen.append(found(f"hf:{tmp_path}")[str(tmp_path)])
    files[1].rename(tmp_path / "en" / "c.jsonl")
    seen.append(found(f"hf:{tmp_path}")[str(tmp_path)])
    assert len(set(seen)) == 3


@pytest.mark.parametrize("text", ["builtin", "hf:owner/name", "missing.txt", "/no/such/file.jsonl"])
def test_what_is_not_here_is_left_out(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("builtin").write_text("a file of this name is not what 'builtin' means")
    assert with_files({"seed": 0}, [Source(text=text)]) == {"seed": 0}


def test_the_work_gets_the_recipe_back(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    settings = Calibration(text=str(tmp_path / "a.txt"))
    parameters = with_files(settings.model_dump(mode="json"), settings.sources)
    assert "files" in parameters and Calibration.model_validate(without(parameters)) == settings
