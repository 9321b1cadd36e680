"""Distillation as a command, in as many processes and on as many nodes as torchrun starts.

    torchrun --nproc-per-node 8 -m trimtab.components.distillation \\
        --student FOLDER --teacher FOLDER --output FOLDER --scratch FOLDER \\
        --recipe '{tokens: 100000000, batch_size: 64}'

`--recipe` is the section `distill` of a recipe, or a file with it. All processes see the same folders. The last line
is the metrics as JSON; the exit codes are those of trimtab.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from trimtab.base import child
from trimtab.base.errors import Failure, TrimtabError
from trimtab.recipe import Distillation
from trimtab.runtime.parallel import torchrun

_WORK = "trimtab.components.distillation.work:train"


def main(arguments: list[str] | None = None) -> int:
    """Trains, and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m trimtab.components.distillation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--student", help="the model that learns, a Hugging Face folder")
    parser.add_argument("--teacher", help="the model it learns from, a Hugging Face folder")
    parser.add_argument("--output", help="an empty folder for the trained student")
    parser.add_argument("--scratch", help="a folder for checkpoints, which a restart goes on from")
    parser.add_argument("--recipe", help="the section `distill` of a recipe, YAML or JSON, or a file with it")
    parser.add_argument("--generated", help="what the stage `generate` made")
    parser.add_argument("--teacher-logits", help="what the stage `teach` made")
    parser.add_argument("--request", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.request:
            return _answer(json.loads(options.request.read_text(encoding="utf-8")), options.answer)
        wanted = _wanted(parser, options)
        with torchrun.joined():
            found = child.done(child.answer_of(_WORK, wanted))
            if torchrun.rank() == 0:
                print(json.dumps(found.value))
    except TrimtabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3 if isinstance(error, Failure) else error.exit_code
    return 0


def _wanted(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    for name in ("student", "teacher", "output", "scratch", "recipe"):
        if not getattr(options, name):
            parser.error(f"--{name} is required")
    path = Path(options.recipe)
    text = path.read_text(encoding="utf-8") if path.suffix in (".yaml", ".yml", ".json") else options.recipe
    settings = Distillation.parse(text)
    Path(options.output).mkdir(parents=True, exist_ok=True)
    return {
        "checkpoint": options.student,
        "model": options.teacher,
        "output": options.output,
        "scratch": options.scratch,
        "parameters": settings.model_dump(mode="json"),
        "generated": options.generated,
        "teacher_logits": options.teacher_logits,
    }


def _answer(request: dict[str, Any], path: Path) -> int:
    """One of the processes that a stage started: the first answers it, or whichever fails."""
    child.die_with(os.getppid())
    child.follow_run()
    with torchrun.joined():
        answer = child.answer_of(_WORK, request)
        failed = "value" not in answer
        if failed or torchrun.rank() == 0:
            partial = path.with_suffix(f".{torchrun.rank()}")
            partial.write_text(json.dumps(answer), encoding="utf-8")
            partial.replace(path)
        if failed:
            os._exit(1)  # the others may wait for this process, which must not wait for them
    return 0


if __name__ == "__main__":
    sys.exit(main())
