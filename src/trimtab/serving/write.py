"""Writes what a server needs to serve one artifact, whole or not at all: TensorRT-LLM's, vLLM, or trimtab's own."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path

import yaml

from trimtab.base.errors import InputError
from trimtab.catalog.backends import BACKENDS, TENSORRT_LLM
from trimtab.model.hardware import TENSORRT_LLM_FORMATS, TENSORRT_LLM_KV_CACHES
from trimtab.serving import commands, kserve, triton
from trimtab.serving.artifact import Served
from trimtab.serving.settings import compiled_args, llm_args, serve_command, target_version

_README = """\
# Serving {name}

{what}, for TensorRT-LLM {version}{verdict}

| file | what it is for |
|---|---|
| `serve.sh` | an OpenAI-compatible server: trtllm-serve |
| `llm_args.yaml` | its settings; flags of the same name would win in newer versions and lose in older ones |
| `triton/` | a model repository of NVIDIA's Triton |
| `kserve.yaml` | a KServe InferenceService: `kubectl apply -f kserve.yaml` |

{places}
"""


def write(served: Served, folder: Path, model_uri: str = "", image: str = "") -> list[str]:
    """Writes `serve.sh` and a README, for TensorRT-LLM also `llm_args.yaml`, `triton/` and `kserve.yaml`; returns their
    paths.

    Args:
        folder: does not exist, or is empty.
        model_uri: where a cluster finds the artifact, see `kserve`; `pvc://<name>/` when empty.
        image: of the KServe container; NVIDIA's of the version that serves when empty.

    Raises:
        InputError: the folder is not empty, the back end does not serve the artifact, or needs more than `model_uri`
            holds.
    """
    if served.settings.backend in TENSORRT_LLM:
        _check(served)
        if model_uri.startswith(kserve.MODELCAR) and BACKENDS[served.settings.backend].compiled:
            raise InputError(
                f"model_uri: '{model_uri}' holds the checkpoint alone, and {served.settings.backend} reads engines "
                "beside it; write s3://… or pvc://… of a folder with `export` and `engine`"
            )
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"folder: '{folder}' is there already; write a new folder")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"folder: '{folder.absolute().parent}' is not a folder; make it, or write another")
    files = _files(served, model_uri, image) if served.settings.backend in TENSORRT_LLM else commands.files(served)
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
        try:
            for path, text in files.items():
                (partial / path).parent.mkdir(parents=True, exist_ok=True)
                (partial / path).write_text(text, encoding="utf-8")
                (partial / path).chmod(0o755 if path.endswith(".sh") else 0o644)
            partial.chmod(0o755)
            os.replace(partial, folder)  # an empty folder is replaced too
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InputError(f"folder: '{folder}' cannot be written ({error.strerror}); write another") from None
    return sorted(files)


def _check(served: Served) -> None:
    backend = served.settings.backend
    if not set(served.formats) & set(TENSORRT_LLM_FORMATS[backend]):
        known = ", ".join(TENSORRT_LLM_FORMATS[backend])
        raise InputError(f"artifact: {backend} does not serve {served.formats[0]}; it serves: {known}")
    if served.kv_cache != "none" and served.kv_cache not in TENSORRT_LLM_KV_CACHES[backend]:
        known = ", ".join(TENSORRT_LLM_KV_CACHES[backend])
        raise InputError(f"artifact: {backend} serves no KV cache in {served.kv_cache}; it serves: {known}")


def _files(served: Served, model_uri: str, image: str) -> dict[str, str]:
    settings, engines = served.settings, BACKENDS[served.settings.backend].compiled
    arguments = yaml.safe_dump(compiled_args(settings) if engines else llm_args(settings), sort_keys=False)
    if engines:
        repository = triton.inflight_batcher(settings, served.engine_path, served.model_path)
    else:
        repository = triton.llm_api(settings, served.model_path)
    uri = model_uri or f"pvc://{served.name}/"
    service = kserve.inference_service(served, uri, image or kserve.image(served), arguments)
    command = shlex.join(serve_command(settings, served.model_path, served.engine_path, "llm_args.yaml"))
    return {
        "README.md": _readme(served, uri),
        "serve.sh": f'#!/bin/sh\ncd "$(dirname "$0")"\nexec {command} "$@"\n',
        "llm_args.yaml": arguments,
        "kserve.yaml": yaml.safe_dump(service, sort_keys=False),
        **{f"triton/{path}": text for path, text in repository.items()},
    }


def _readme(served: Served, uri: str) -> str:
    engines = BACKENDS[served.settings.backend].compiled
    places = [f"The checkpoint is expected in `{served.model_path}`, in the cluster at `{uri}`."]
    if engines:
        places.append(f"The engines are expected in `{served.engine_path}`; they run on the GPU they were built on.")
        places.append("`triton/fill_templates.sh` adds NVIDIA's models for tokens and text around the engine.")
    else:
        places.append(
            "Triton's model is NVIDIA's: copy `1/*.py` of `all_models/llmapi/tensorrt_llm` into "
            "`triton/tensorrt_llm/1/`, from the Triton image or from TensorRT-LLM's `triton_backend`."
        )
    places += [
        f"`trimtab artifact export {tree} FOLDER` writes the {name} into `FOLDER/files`."
        for name, tree in served.trees.items()
    ]
    kv_cache = f", KV cache in {served.kv_cache}" if served.kv_cache != "none" else ""
    return _README.format(
        name=served.name,
        what=f"{served.formats[0]}{kv_cache}, on {served.settings.world_size} GPU",
        version=target_version(served.settings),
        verdict=f": {served.reason}" if served.reason else "; trimtab has not judged it",
        places="\n".join(places),
    )
