"""What stands at the root for people: each says what is so."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import yaml

import trimtab

ROOT = Path(__file__).parents[2]


def test_make_help_tells_of_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    # Below `make test`, a make of its own would also say which directory it enters.
    command = ["make", "--no-print-directory", "help"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    told = {line.split()[1] for line in said.splitlines()}
    assert told == set(targets) - {"help"} and all(len(line.split()) > 2 for line in said.splitlines())


def test_the_version_is_everywhere_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert trimtab.__version__ == project["version"] == citation["version"]
    assert citation["license"] == project["license"]
    assert f"## {trimtab.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert {"authors", "classifiers", "keywords"} <= project.keys()
