"""Prints a project's dependencies, or those of one of its extras: requirements.py pyproject.toml [extra]."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
extra = sys.argv[2] if len(sys.argv) > 2 else None
print(*(project["optional-dependencies"][extra] if extra else project["dependencies"]), sep="\n")
