"""The command `plan`: what a run would do, or how an engine is sized for a workload."""

from __future__ import annotations

import argparse
import json
from itertools import count
from typing import Any

from rich.console import Console
from rich.table import Table

from trimtab.base.errors import InputError
from trimtab.model import hardware
from trimtab.pipelines import api
from trimtab.pipelines.commands import run
from trimtab.pipelines.inputs import read
from trimtab.planning import resources
from trimtab.planning.matrix import Outline
from trimtab.planning.resources import Resources
from trimtab.recipe import Recipe, workload
from trimtab.serving import traffic

GPUS = 8


def add(commands: Any) -> None:
    """Adds the command to the parser of `trimtab`; it takes all options of `run`."""
    plan = commands.add_parser("plan", help="show the baseline and the ladder of recipes, and why each stands there")
    run.add_options(plan)
    plan.add_argument("--json", action="store_true", help="print baseline, rungs and what is refused, for scripts")
    plan.add_argument("--engine", action="store_true", help="size an engine for a workload instead, line by line")
    plan.add_argument("--workload", default="", metavar="FILE", help="lengths and concurrency, YAML (for --engine)")
    plan.add_argument("--gpus", type=int, metavar="N", help=f"devices there are, for --engine ({GPUS})")
    plan.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace, console: Console) -> int:
    for name in () if arguments.engine else ("workload", "gpus"):
        if getattr(arguments, name):
            other = ", or write the workload into the recipe" if name == "workload" else ""
            raise InputError(f"{name}: is for sizing an engine; add --engine{other}")
    if arguments.engine and arguments.json:
        raise InputError("json: is for the plan of a run; leave --engine or --json out")
    about = {"goal": arguments.goal, "target": arguments.target}
    try:
        asked = run.asked(arguments)
        if arguments.engine:
            api.checked(arguments.model, **asked)
            return _plan_engine(arguments)
        outline = api.plan(arguments.model, **asked)
    except InputError as error:
        if arguments.json:
            refused = [{"title": "", "why": str(error)}]
            print(json.dumps({**about, "baseline": None, "rungs": [], "refused": refused}, ensure_ascii=False))
        raise
    if arguments.json:
        print(json.dumps({**about, **outline}, ensure_ascii=False, indent=1))
        return 0
    baseline = outline["baseline"]
    backend = baseline["recipe"].get("engine", {}).get("backend", "torch")
    table = Table("", "recipe", "why", title=f"{arguments.goal} on {arguments.target}, {backend}")
    table.add_row("", "baseline", baseline["why"])
    for number, rung in enumerate(outline["rungs"], start=1):
        table.add_row(str(number), rung["title"], rung["why"])
    out = Console()
    out.print(table)
    out.print(_resources(outline))
    told = outline["power"]["told"]
    out.print(told[:1].upper() + told[1:] + ".", soft_wrap=True, highlight=False, markup=False)
    for other in outline["refused"]:
        out.print(f"not tried: {other['title']}: {other['why']}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _resources(outline: Outline) -> Table:
    """What each stage needs before it runs: the baseline's, then of each rung what it does not share with one above."""
    names = ("", "stage", "GPUs", "memory", "scratch disk", "about")
    table = Table(*names, title="what each stage needs, where its result is not in the store")
    seen = set()
    for label, planned in [("baseline", outline["baseline"]), *zip(count(1), outline["rungs"], strict=False)]:
        for stage, need in planned["resources"].items():
            cells = resources.columns(Resources(**need))
            if (stage, cells) not in seen:
                table.add_row(str(label), stage, *cells)
                label = ""
                seen.add((stage, cells))
    return table


def _plan_engine(arguments: argparse.Namespace) -> int:
    from trimtab.components.fetch.facts import facts
    from trimtab.planning.engine import plan_engine

    target, text = hardware.target(arguments.target), read(arguments.recipe, "recipe")
    recipe = Recipe.parse(text) if text else Recipe.parse({"engine": {"backend": target.default_backend}})
    known = facts(arguments.model)
    text = read(arguments.workload, "workload")
    asked = workload.parse(text) if text else recipe.workload or workload.Workload()
    recorded = traffic.of(asked)
    gpus = GPUS if arguments.gpus is None else arguments.gpus
    plan = plan_engine(known, recipe, target, recorded.workload if recorded else asked, gpus=gpus)
    title = f"{recipe.title} on {arguments.target}, {recipe.engine.backend}"
    table = Table("setting", "value", "why", title=title)
    for line in plan.lines:
        table.add_row(line.setting, line.value, line.why)
    out = Console()
    if recorded:
        out.print(f"recorded: {recorded.sentence}", soft_wrap=True, highlight=False)
    out.print(table)
    out.print("engine:", plan.recipe.engine.to_json(), soft_wrap=True, highlight=False)
    return 0
