"""Which of trimtab's back ends a version of TensorRT-LLM has.

The LLM API reads ModelOpt's unified checkpoints from 1.2.0 on (ModelOpt, docs/source/deployment/3_unified_hf.rst).
Engines are built by 1.2.1, and by pre-releases up to 1.3.0rc20: "the last one supporting the TensorRT backend"
(github.com/NVIDIA/TensorRT-LLM/releases/tag/v1.3.0rc20). The arguments of `trtllm-build` that trimtab knows are those
of 1.0 and later.
"""

from __future__ import annotations

import importlib.metadata

from packaging.version import InvalidVersion, Version

from trimtab.base.errors import InputError
from trimtab.catalog.formats import WeightFormat

#: back end -> the first and the last version that has it, None where there is no last.
RANGES: dict[str, tuple[str, str | None]] = {
    "trtllm": ("1.2.0", None),
    "trtllm-legacy": ("1.0.0", "1.3.0rc20"),
}
#: What is planned for where nobody says: the newest that is no pre-release.
NEWEST = "1.2.1"


def parse(text: str) -> Version:
    """Reads a version of TensorRT-LLM.

    Raises:
        InputError: it is none.
    """
    try:
        return Version(text)
    except InvalidVersion:
        raise InputError(f"'{text}' is no version of TensorRT-LLM; write one like {NEWEST} or 1.3.0rc20") from None


def within(version: Version, since: str | None, until: str | None) -> bool:
    """Whether a version lies in a range whose ends belong to it; None is an open end."""
    return (since is None or Version(since) <= version) and (until is None or version <= Version(until))


def backends(version: str) -> tuple[str, ...]:
    """Returns the back ends that a version has, the one to prefer first."""
    return tuple(name for name, ends in RANGES.items() if within(parse(version), *ends))


def refusal(backend: str, version: str) -> str | None:
    """Returns why a version of TensorRT-LLM cannot be asked for a back end, or None when it can."""
    if backend not in RANGES or backend in backends(version):
        return None
    since, until = RANGES[backend]
    exists = f"is in {since} and later" if until is None else f"ends with {NEWEST} and {until}, and begins with {since}"
    others = " or ".join(backends(version))
    remedy = f"write engine.backend: {others}" if others else "take a newer version"
    return f"engine.backend: TensorRT-LLM {version} has no '{backend}', which {exists}; {remedy}"


def too_old(row: WeightFormat, version: str | None) -> str | None:
    """Returns why a version of TensorRT-LLM does not read a format; None if it does, or nobody knows the version."""
    since = max((part.storage.since for part in row.parts if part.storage.since), key=parse, default=None)
    if since is None or version is None or within(parse(version), since, None):
        return None
    return (
        f"quantize.format: {row.name} is read by TensorRT-LLM from {since} on, and {version} is asked for; write "
        f"int4_gptq, or engine.backend: vllm"
    )


def installed() -> str | None:
    """Returns the version of TensorRT-LLM in this environment, without importing it; None when there is none."""
    try:
        return importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        return None
