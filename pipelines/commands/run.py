"""The command `run`: optimizes a model on this machine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from trimtab.base.errors import NotReleased, StageError, TrimtabError
from trimtab.catalog.goals import GOALS
from trimtab.model import hardware
from trimtab.pipelines import api
from trimtab.pipelines.inputs import ATTEMPTS, GOAL, TARGET, read_evaluation, read_profile

if TYPE_CHECKING:
    from trimtab.pipelines.local import Outcome


def add(commands: Any) -> None:
    """Adds the command to the parser of `trimtab`."""
    run = commands.add_parser("run", help="optimize a model on this machine")
    add_options(run)
    run.add_argument("--json", action="store_true", help="print events as JSON lines, for scripts; the last is the end")
    run.add_argument("--profile", default="", metavar="FILE", help="a cluster's profile, for its prices, YAML")
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
    if arguments.json:
        return _run_for_scripts(arguments, console)
    outcome = _outcome(arguments, console)
    from trimtab.report import console_lines, console_table

    out = Console(width=None if sys.stdout.isatty() else 120)
    if outcome.state:
        out.print(console_table(outcome.state))
        for line in console_lines(outcome.state):
            out.print(line, soft_wrap=True, highlight=False, markup=False)
        out.print(f"report   {outcome.page}", soft_wrap=True, highlight=False)
    if outcome.error:
        console.print(f"trimtab: {outcome.error}", style="red", markup=False, highlight=False)
        console.print(f"log      {outcome.log}", soft_wrap=True, highlight=False)
    else:
        out.print(f"release  {outcome.release}", soft_wrap=True, highlight=False)
    for step in _next(outcome):
        (console if outcome.error else out).print(f"next     {step}", soft_wrap=True, highlight=False, markup=False)
    return outcome.error.exit_code if outcome.error else 0


def _outcome(arguments: argparse.Namespace, console: Console, events: TextIO | None = None) -> Outcome:
    return api.run(
        arguments.model,
        arguments.store,
        **asked(arguments),
        require_signature=arguments.require_signature,
        runs=arguments.runs,
        console=console,
        events=events,
        prices=read_profile(arguments.profile).prices,
    )


def _run_for_scripts(arguments: argparse.Namespace, console: Console) -> int:
    """Prints each event of the run as a line of JSON, and at last how it ended; progress for people stays where it is.

    The stream is a copy of the standard output, which the run itself sends to its log.
    """
    sys.stdout.flush()
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1) as events:
        try:
            outcome = _outcome(arguments, console, events)
        except TrimtabError as error:
            end = {"event": "end", "exit_code": error.exit_code, "error": str(error)}
            print(json.dumps(end, ensure_ascii=False), file=events)
            raise
        from trimtab.report.rows import one_line

        end = {
            "event": "end",
            "exit_code": outcome.error.exit_code if outcome.error else 0,
            "error": str(outcome.error) if outcome.error else "",
            "release": outcome.release or "",
            "report": str(outcome.page or ""),
            "log": str(outcome.log),
            "attempts": [
                {
                    "recipe": one_line(brief.recipe.title),
                    "outcome": brief.verdict.outcome,
                    "failure_class": brief.verdict.failure_class,
                    "reason": brief.verdict.reason,
                    "gain": brief.verdict.gain,
                }
                for brief in (outcome.state.history if outcome.state else ())
            ],
            "next": _next(outcome),
        }
        print(json.dumps(end, ensure_ascii=False), file=events)
    return end["exit_code"]


def _next(outcome: Outcome) -> list[str]:
    """Returns what to do next: serve the release, try something else, or go on."""
    from trimtab.report import next_steps, serving

    if outcome.error is None and outcome.state:
        return serving(outcome.state)
    if isinstance(outcome.error, NotReleased) and outcome.state:
        return next_steps(outcome.state)
    if isinstance(outcome.error, StageError):
        return ["the same command goes on from the stages that were complete"]
    return []
