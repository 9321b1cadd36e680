"""The command `run`: optimizes a model on this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.catalog.goals import GOALS
from trimtab.model import hardware
from trimtab.pipelines import api
from trimtab.pipelines.inputs import ATTEMPTS, GOAL, TARGET, read_evaluation


def add(commands: Any) -> None:
    """Adds the command to the parser of `trimtab`."""
    run = commands.add_parser("run", help="optimize a model on this machine")
    add_options(run)
    run.set_defaults(command=_run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a run, which `plan` takes too."""
    parser.add_argument("--model", required=True, help="a folder, a .gguf file, s3://…, or a hub id org/name")
    add_aim(parser)
    parser.add_argument("--store", default=api.STORE, help=f"s3://bucket/prefix or a folder (./{api.STORE})")
    parser.add_argument("--name", default="", help="name of the release (the model's)")
    parser.add_argument(
        "--tasks", help="lm-eval tasks, separated by commas (those of --evaluation, or trimtab_suite)"
    )
    parser.add_argument("--task-path", default="", metavar="DIR", help="a folder with lm-eval task YAMLs")
    parser.add_argument("--require-signature", action="store_true", help="release nothing that cannot be signed")
    parser.add_argument("--runs", default=api.RUNS, metavar="DIR", help=f"logs and reports of runs (./{api.RUNS})")


def add_aim(parser: argparse.ArgumentParser) -> None:
    """Adds what a run is for, wherever it runs: goal, target, recipe, attempts and evaluation."""
    goal = parser.add_argument("--goal", default=GOAL, help=f"one of {', '.join(GOALS)} ({GOAL})")
    target = parser.add_argument("--target", default=TARGET, help=f"one of {', '.join(hardware.TARGETS)} ({TARGET})")
    for option, values in ((goal, GOALS), (target, hardware.TARGETS)):
        option.completer = lambda values=tuple(values), **_: values  # for the shell; see `main`
    parser.add_argument("--recipe", default="", metavar="FILE", help="a recipe to try first, YAML or JSON")
    parser.add_argument(
        "--max-attempts", type=int, default=ATTEMPTS, metavar="N", help=f"the most attempts, 1 to 10 ({ATTEMPTS})"
    )
    parser.add_argument("--evaluation", default="", metavar="FILE", help="items, windows and text to measure, YAML")


def asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what the options ask for, as `api.run` and `api.plan` take it."""
    return {
        "goal": arguments.goal,
        "target": arguments.target,
        "recipe": Path(arguments.recipe) if arguments.recipe else None,
        "evaluation": read_evaluation(arguments.evaluation, arguments.tasks, arguments.task_path),
        "max_attempts": arguments.max_attempts,
        "name": arguments.name,
    }


def _run(arguments: argparse.Namespace, console: Console) -> int:
    outcome = api.run(
        arguments.model,
        arguments.store,
        **asked(arguments),
        require_signature=arguments.require_signature,
        runs=arguments.runs,
        console=console,
    )
    from trimtab.report import console_table

    out = Console(width=None if sys.stdout.isatty() else 120)
    if outcome.state:
        out.print(console_table(outcome.state))
        out.print(f"report   {outcome.page}", soft_wrap=True, highlight=False)
    if outcome.error:
        console.print(f"trimtab: {outcome.error}", style="red", markup=False, highlight=False)
        console.print(f"log      {outcome.log}", soft_wrap=True, highlight=False)
        return outcome.error.exit_code
    out.print(f"release  {outcome.release}", soft_wrap=True, highlight=False)
    return 0
