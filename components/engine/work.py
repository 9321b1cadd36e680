"""Builds an engine: what its back end needs on disk, then a warm load and a smoke generation."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import yaml

from trimtab.base import child, progress
from trimtab.base.errors import Failure, InputError
from trimtab.catalog.contracts import version
from trimtab.components.engine import smoke
from trimtab.recipe import Engine
from trimtab.serving import vllm
from trimtab.serving.record import Built
from trimtab.serving.settings import llm_args

#: Environment variable: seconds that `trtllm-build`, and then the warm load, may take.
TIME_LIMIT = "TRIMTAB_ENGINE_SECONDS"
_SECONDS = 3600


def build(export: str, output: str, scratch: str, parameters: dict[str, Any]) -> dict[str, float]:
    """Makes the export servable, and shows that it serves.

    Writes `engine.json` (`trimtab.serving.record`); for `trtllm` also `llm_args.yaml`, which trtllm-serve reads; for
    `trtllm-legacy` also `engine/`, an engine for each rank; for `vllm` also `serve.sh`, its server's command,
    and where vLLM does not read the export, `checkpoint/`, which it does.

    Returns:
        layers, emulated_layers (run in another precision than the export's), weight_bytes, device_bytes.

    Raises:
        Failure: `unsupported`, a back end that this image does not have; `export_damaged`, the export does not
            load or its outputs are not numbers; `degenerate_output`; `does_not_fit`.
        StageError: TensorRT-LLM or vLLM took longer than the time limit.
    """
    from trimtab.runtime.engines import backends

    settings, folder, translated = Engine.model_validate(parameters), Path(output), ""
    backends.check(settings)
    if settings.backend == "trtllm":
        _check_version(Path(export))
        (folder / "llm_args.yaml").write_text(yaml.safe_dump(llm_args(settings), sort_keys=False), encoding="utf-8")
    elif settings.backend == "trtllm-legacy":
        from trimtab.components.engine.trtllm import legacy

        legacy.build(Path(export), folder / backends.RANKS, Path(scratch), settings, _time_limit())
    elif settings.backend == "vllm":
        from trimtab.runtime.checkpoint import compressed_tensors

        model = '"${1:?folder of the export}"'
        if compressed_tensors.is_needed(Path(export)):
            checkpoint = folder / backends.CHECKPOINT
            translated = compressed_tensors.translate(Path(export), checkpoint, Path(scratch) / "shards")
            model = f'"$(dirname "$0")/{backends.CHECKPOINT}"'
        command = shlex.join(vllm.serve_command(settings, "MODEL")).replace("MODEL", model)
        (folder / "serve.sh").write_text(f"#!/bin/sh\nexec {command}\n", encoding="utf-8")
    built = Built(
        settings=settings,
        checkpoint=backends.checkpoint_digest(Path(export)),
        translated=translated,
        versions=backends.versions(),
        device=backends.device(),
    )
    built.write(folder)
    if settings.backend == "torch":  # this process is a child already
        figures = smoke.smoke(output, export)
    else:  # these libraries can hang, and start processes of their own
        progress.report("engine", f"at most {_time_limit():g} s")
        work = "trimtab.components.engine.smoke:smoke"
        figures = child.call(work, time_limit=_time_limit(), engine=output, export=export).value
    built.model_copy(update=figures).write(folder)
    kernels = figures["kernels"]
    return {
        "layers": len(kernels),
        "emulated_layers": sum(kernel["emulated"] for kernel in kernels.values()),
        "weight_bytes": figures["weight_bytes"],
        "device_bytes": figures["device_bytes"],
    }


def _check_version(export: Path) -> None:
    """Refuses layers that the TensorRT-LLM of this image is too old for, before its loader fails on their name."""
    from trimtab.runtime.checkpoint.model_files import Export

    found = version.installed()
    for storage in {layout.storage for layout in Export(export).layers.values()}:
        if found and storage.since and not version.within(version.parse(found), storage.since, None):
            what = f"TensorRT-LLM reads {storage.algorithm} from {storage.since} on, and this image has {found}"
            raise Failure("unsupported", f"{what}; write int4_gptq, or take a newer image")


def _time_limit() -> float:
    text = os.environ.get(TIME_LIMIT) or str(_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise InputError(f"{TIME_LIMIT}: '{text}' is not valid; write seconds, such as {_SECONDS}")
    return seconds
