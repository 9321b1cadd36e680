"""The command `watch-release`: whether a service still answers as its release did."""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.base.errors import Drifted, InputError, StageError
from trimtab.pipelines.commands.arguments import add_keys, add_release, add_store_of_uri
from trimtab.release import watch
from trimtab.release.watch import Tolerance

_USUAL = Tolerance()


def add(commands: Any) -> None:
    """Adds the command to the parser of `trimtab`."""
    parser = commands.add_parser(
        "watch-release", help="ask a deployed service the prompts of its release again, and compare"
    )
    add_release(parser)
    parser.add_argument("--url", required=True, help="the service: OpenAI's completions API, http://host:port")
    parser.add_argument("--model", default="", help="as the service calls it (its first one)")
    add_store_of_uri(parser)
    add_keys(parser)
    for name, text in (
        ("agreement", "the least share of the texts that begins alike"),
        ("slowdown", "how many times as slow it may answer"),
        ("refusals", "the share of prompts that it may refuse beyond the release"),
    ):
        usual = getattr(_USUAL, name)
        parser.add_argument(f"--{name}", type=float, default=usual, metavar="X", help=f"{text} ({usual:g})")
    parser.add_argument("--metrics", default="", metavar="FILE", help="write Prometheus' text format there too")
    parser.add_argument("--every", type=_interval, metavar="TIME", help="go on, every 30s, 5m or 1h")
    parser.add_argument("--port", type=int, metavar="N", help="serve /metrics there; with --every")
    parser.set_defaults(command=_watch)


def _interval(text: str) -> float:
    match = re.fullmatch(r"([1-9]\d{0,5})([smh])", text)
    if not match:
        raise InputError(f"every: '{text}' is not valid; write such as 30s, 5m or 1h")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def _watch(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.base import signing
    from trimtab.components.deployment import watching
    from trimtab.pipelines.api import store_of

    if arguments.port is not None and arguments.every is None:
        raise InputError(f"port: {arguments.port} is for going on; write --every 5m with it, or --metrics FILE")
    tolerance = Tolerance(arguments.agreement, arguments.slowdown, arguments.refusals)
    keys = [signing.public_key(Path(key)) for key in arguments.key]
    wanted = watch.expected(store_of(arguments.release, arguments.store), arguments.release, keys)
    with watching.exported(arguments.port) as exporter:
        while True:
            try:
                seen = _once(arguments, wanted, tolerance)
            except StageError as error:
                if arguments.every is None:
                    raise
                console.print(f"trimtab: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            else:
                text = watch.exposition(wanted, seen, time.time())
                _write(arguments.metrics, text)
                if exporter:
                    exporter.text = text
                if arguments.every is None:
                    break
            time.sleep(arguments.every)
    if seen.drifts:
        raise Drifted(f"{arguments.url} is not {wanted.release} as it was judged: {'; '.join(seen.drifts)}")
    return 0


def _once(arguments: argparse.Namespace, wanted: watch.Expected, tolerance: Tolerance) -> watch.Observation:
    from trimtab.components.deployment import watching

    answers = watching.ask(arguments.url, arguments.model, wanted.answers, token=os.environ.get("OPENAI_API_KEY", ""))
    seen = watch.observe(wanted, answers, tolerance)
    out = Console(soft_wrap=True, highlight=False)
    speed = f"{seen.slowdown:.2f} times as slow" if seen.slowdown else "its tokens are not counted"
    out.print(
        f"watched   {wanted.release}: {seen.agreement:.0%} begins alike, {seen.identical:.0%} the same; {speed}; "
        f"refuses {seen.refused:.0%}, then {seen.refused_before:.0%}",
        markup=False,
    )
    for drift in seen.drifts:
        out.print(f"drifted   {drift}", markup=False)
    return seen


def _write(path: str, text: str) -> None:
    """Writes a file whole or not at all: who collects it may read at any moment."""
    if not path:
        return
    try:
        draft = Path(f"{path}.new")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise InputError(f"metrics: '{path}' cannot be written ({error.strerror}); write another file") from None
