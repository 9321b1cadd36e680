"""What serves an artifact outside TensorRT-LLM: a command for vLLM, or for trimtab's own server with its settings."""

from __future__ import annotations

import shlex

import yaml

from trimtab.serving import vllm
from trimtab.serving.artifact import Served

_README = """\
# Serving {name}

{what}, for {server}{verdict}

| file | what it is for |
|---|---|
| `serve.sh` | an OpenAI-compatible server; what is written behind it is handed on, such as `--port 8080` |
{files}
The checkpoint is expected in `{model}`.
{places}

`trimtab deploy RELEASE --rollout FILE` brings it to KServe.
"""


def files(served: Served) -> dict[str, str]:
    """Returns the files, path -> text, for the back ends torch and vllm.

    Raises:
        InputError: settings that the server does not have.
    """
    if served.settings.backend == "vllm":
        command, more = vllm.serve_command(served.settings, served.model_path), {}
        server = f"vLLM {vllm.VERSIONS[0]}"
    else:
        command = ["trimtab", "serve", served.model_path, "--recipe", "recipe.yaml"]
        more = {"recipe.yaml": yaml.safe_dump({"engine": served.settings.to_dict()}, sort_keys=False)}
        server = "trimtab's own engine"
    kv_cache = f", KV cache in {served.kv_cache}" if served.kv_cache != "none" else ""
    places = [
        f"`trimtab artifact export {tree} FOLDER` writes the {name} into `FOLDER/files`."
        for name, tree in served.trees.items()
    ]
    readme = _README.format(
        name=served.name,
        what=f"{served.formats[0]}{kv_cache}",
        server=server,
        verdict=f": {served.reason}" if served.reason else "; trimtab has not judged it",
        files="".join(f"| `{name}` | its settings |\n" for name in more),
        model=served.model_path,
        places="\n".join(places),
    )
    script = f'#!/bin/sh\ncd "$(dirname "$0")"\nexec {shlex.join(command)} "$@"\n'
    return {"README.md": readme, "serve.sh": script, **more}
