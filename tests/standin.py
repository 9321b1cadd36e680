"""Makes the stand-ins for TensorRT-LLM and vLLM importable, as a version of one's choice, here and in children."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "standins"


def install(folder: Path, patch: pytest.MonkeyPatch, version: str = "1.2.1", tensorrt: str | None = "10.14.1") -> None:
    """Puts a "site-packages" with tensorrt_llm on the paths of modules, and a `trtllm-build` on that of commands."""
    site, commands = folder / "site", folder / "bin"
    shutil.copytree(SOURCE / "tensorrt_llm", site / "tensorrt_llm")
    shutil.copy(SOURCE / "recombine.py", site / "tensorrt_llm")
    _name(site, tensorrt_llm=version, tensorrt=tensorrt)
    commands.mkdir()
    script = commands / "trtllm-build"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{SOURCE / "trtllm_build.py"}" "$@"\n')
    script.chmod(0o755)
    _make_importable(site, patch, "tensorrt_llm")
    patch.setenv("PATH", os.pathsep.join((str(commands), os.environ["PATH"])))


def install_vllm(folder: Path, patch: pytest.MonkeyPatch, version: str = "0.24.0") -> None:
    """Puts a "site-packages" with vllm on the paths of modules."""
    site = folder / "site"
    shutil.copytree(SOURCE / "vllm", site / "vllm")
    _name(site, vllm=version)
    _make_importable(site, patch, "vllm")


def _name(site: Path, **versions: str | None) -> None:
    for package, number in versions.items():
        if number:
            about = site / f"{package}-{number}.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}\n")


def _make_importable(site: Path, patch: pytest.MonkeyPatch, package: str) -> None:
    patch.syspath_prepend(site)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        patch.delitem(sys.modules, name)
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH")))))
