"""The commands that serve an artifact, look at what was asked of it, or write what another server needs: serve, traffic
and serve-config."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.base import child
from trimtab.base.errors import InputError
from trimtab.pipelines import api
from trimtab.pipelines.inputs import check_choice, read, release_name
from trimtab.recipe import Engine, Recipe
from trimtab.serving import request_log
from trimtab.serving.traffic import LEAST, Quantiles, Traffic, drift, shape


def add(commands: Any) -> None:
    """Adds the commands to the parser of `trimtab`."""
    serve = commands.add_parser("serve", help="answer OpenAI's HTTP requests from an export, on the torch engine")
    serve.add_argument("artifact", metavar="WHAT", help="a model's folder, or the URI of a release or of a tree")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    serve.add_argument("--port", type=int, default=8000, help="port to listen on (8000)")
    serve.add_argument("--name", default="", help="the model's name for clients (the folder's or the release's)")
    serve.add_argument("--recipe", default="", metavar="FILE", help="its section `engine` says how (the release's)")
    serve.add_argument("--strategy", default="in-flight", help="in-flight, dynamic or static batching (in-flight)")
    serve.add_argument("--device", default="auto", help="cpu, cuda, or auto for CUDA where there is one (auto)")
    serve.add_argument("--record", default="", metavar="FOLDER", help="log when requests come and how long they are")
    serve.set_defaults(command=_serve)

    traffic = commands.add_parser("traffic", help="show the shape of recorded requests, and how far it has moved")
    traffic.add_argument("log", metavar="LOG", help="what `serve --record` wrote, or another log: a path or s3://…")
    traffic.add_argument("--days", type=float, default=None, metavar="N", help="the newest days of it (all)")
    traffic.add_argument("--release", default="", metavar="URI", help="compare with what this release was sized for")
    traffic.set_defaults(command=_traffic)

    config = commands.add_parser("serve-config", help="write what serves an artifact: TensorRT-LLM, vLLM or trimtab")
    config.add_argument("artifact", metavar="ARTIFACT", help="STORE/releases/NAME/VERSION, or the folder of an export")
    config.add_argument("folder", metavar="FOLDER", help="a new folder")
    config.add_argument("--recipe", default="", metavar="FILE", help="a recipe whose engine serves, not the artifact's")
    config.add_argument("--model-path", default="", metavar="DIR", help="the checkpoint on the server")
    config.add_argument("--engine-path", default="", metavar="DIR", help="built engines on the server (trtllm-legacy)")
    config.add_argument("--model-uri", default="", metavar="URI", help="the checkpoint for KServe: s3://…, pvc://… or oci://…")
    config.add_argument("--image", default="", help="container image for KServe (NVIDIA's)")
    config.set_defaults(command=_serve_config)


def _serve(arguments: argparse.Namespace, console: Console) -> int:
    check_choice("device", arguments.device, ("auto", "cpu", "cuda"))
    if not 0 <= arguments.port <= 65535:
        raise InputError(f"port: {arguments.port} is not valid; write 0 to 65535")
    os.environ.update(child.environment())  # the engine computes in this process, and PyTorch is not imported yet
    try:
        from trimtab.components.engine.server import serve
    except ModuleNotFoundError as error:
        raise InputError(f"serve: the package {error.name} is missing; pip install 'trimtab[serve,torch]'") from None
    folder, name, recipe = _artifact(arguments.artifact)
    recipe = read(arguments.recipe, "recipe") or recipe
    settings = Recipe.parse(recipe).engine if recipe else Engine(enable_chunked_prefill=True)
    record = Path(arguments.record) if arguments.record else None
    served = arguments.name or name, settings, arguments.device, arguments.strategy
    serve.main(folder, *served, arguments.host, arguments.port, record)
    return 0


def _traffic(arguments: argparse.Namespace, console: Console) -> int:
    from rich.table import Table
    if arguments.days is not None and not arguments.days > 0:
        raise InputError(f"days: {arguments.days:g} is not valid; write more than 0")
    before = _released_traffic(arguments.release) if arguments.release else None
    requests = request_log.read(arguments.log)
    found = shape(requests.newest(arguments.days) if arguments.days else requests)
    out = Console(width=None if sys.stdout.isatty() else 120)
    out.print(found.sentence, soft_wrap=True, highlight=False)
    table = Table("tokens", *Quantiles.model_fields)
    for name, lengths in (("input", found.input), ("output", found.output)):
        table.add_row(name, *(f"{value:,.5g}" for value in lengths.model_dump().values()))
    out.print(table)
    for _, sentence in drift(before, found).values() if before else ():
        out.print(f"since the release: {sentence}", soft_wrap=True, highlight=False)
    if found.requests < LEAST:
        console.print(f"fewer than {LEAST:,} requests are too few for a run to go by", highlight=False)
    if found.concurrency:
        out.print("workload:", found.workload.to_json(), soft_wrap=True, highlight=False)
    else:
        console.print("the log does not say how long requests took; add concurrency to a workload", highlight=False)
    return 0


def _released_traffic(uri: str) -> Traffic:
    """Returns what traffic a release was sized for."""
    from trimtab.base import signing
    from trimtab.loop.provenance import Provenance
    from trimtab.release import statement
    from trimtab.store import open_store
    from trimtab.store.address import split_release

    parts = split_release(uri)
    if not parts:
        raise InputError(f"release: '{uri}' is no release; write STORE/releases/NAME/VERSION")
    envelope = open_store(parts[0]).read_release(uri).get("attestation")
    made_of = envelope and statement.read(signing.unseal(envelope)).predicate.evidence.get("materials")
    found = Provenance.parse(made_of).traffic if made_of else None
    if found is None:
        raise InputError(f"release: '{uri}' was not sized for recorded traffic; leave --release out")
    return found


def _artifact(what: str) -> tuple[Path, str, str]:
    """Returns the folder of an artifact, a name for it, and the recipe of a release or ""."""
    from trimtab.store import open_store
    from trimtab.store.address import split_release, split_tree

    if parts := split_release(what):
        store = open_store(parts[0])
        record = store.read_release(what)
        return store.get(record["artifact"]["uri"]), parts[1], json.dumps(record["recipe"])
    if parts := split_tree(what):
        return open_store(parts[0]).get(what), parts[1][:12], ""
    if not (Path(what) / "config.json").is_file():
        raise InputError(f"WHAT: '{what}' is no model: write a folder with a config.json, or a release's URI")
    return Path(what), release_name("", what), ""


def _serve_config(arguments: argparse.Namespace, console: Console) -> int:
    written = api.serve_config(
        arguments.artifact,
        arguments.folder,
        recipe=Path(arguments.recipe) if arguments.recipe else None,
        model_path=arguments.model_path,
        engine_path=arguments.engine_path,
        model_uri=arguments.model_uri,
        image=arguments.image,
    )
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0
