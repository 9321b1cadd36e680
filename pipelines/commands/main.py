"""The `trimtab` command: run, compile and artifact here, the rest in the modules beside it; exit codes are in
`trimtab.base.errors`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab import __version__
from trimtab.base import signing
from trimtab.base.errors import InputError, TrimtabError
from trimtab.base.errors import __doc__ as exit_codes
from trimtab.catalog.goals import DEFAULT_GOAL, GOALS
from trimtab.model import hardware
from trimtab.pipelines.commands import cluster, deploy, local_backend, plan, releases, serving
from trimtab.pipelines.inputs import check_attempts, check_choice, read, read_evaluation, read_profile, release_name
from trimtab.recipe import Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.serving import traffic

STORE = "trimtab-store"
RUNS = "trimtab-runs"


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    try:
        arguments = _parser().parse_args(argv)
        return arguments.command(arguments, console)
    except TrimtabError as error:
        console.print(f"trimtab: {error}", style="red", markup=False, highlight=False)
        return error.exit_code
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        console.print("trimtab: interrupted; the same command goes on from the stages that were complete")
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="trimtab",
        description="Makes a language model smaller and faster, and releases it only when it is still good.",
        epilog=exit_codes.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trimtab {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    run = commands.add_parser("run", help="optimize a model on this machine")
    _add_run(run)
    run.set_defaults(command=_run)
    plan.add(commands, _add_run, _checked)

    compile_ = commands.add_parser(
        "compile", help="write a pipeline for a Kubeflow Pipelines backend >= 2.17.0"
    )
    compile_.add_argument("-o", "--output", required=True, metavar="FILE", help="the pipeline's YAML")
    compile_.add_argument(
        "--max-attempts", type=int, default=10, metavar="N", help="attempts to unroll, 1 to 10 (10)"
    )
    compile_.add_argument(
        "--objects", action="store_true", help="write objects for KFP in its Kubernetes-native mode"
    )
    cluster.add_package(compile_)
    compile_.set_defaults(command=_compile)

    serving.add(commands)
    cluster.add(commands)
    deploy.add(commands)

    artifact = commands.add_parser("artifact", help="carry a stage's result, such as a calibration, to another store")
    actions = artifact.add_subparsers(required=True, metavar="ACTION", parser_class=_Parser)
    export = actions.add_parser("export", help="write a tree and what is known of it into a folder")
    export.add_argument("tree", metavar="TREE", help="URI or digest of the tree, from the page of a run")
    export.add_argument("folder", metavar="FOLDER", help="a new folder")
    export.set_defaults(command=_export_artifact)
    import_ = actions.add_parser("import", help="put such a folder into a store, where the next run finds it")
    import_.add_argument("folder", metavar="FOLDER", help="what `trimtab artifact export` wrote")
    import_.set_defaults(command=_import_artifact)
    for action in (export, import_):
        action.add_argument("--store", default=STORE, help=f"s3://bucket/prefix or a folder (./{STORE})")

    releases.add_commands(commands, STORE)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a run, which `plan` takes too."""
    parser.add_argument("--model", required=True, help="a folder, a .gguf file, s3://…, or a hub id org/name")
    parser.add_argument("--goal", default=DEFAULT_GOAL, help=f"one of {', '.join(GOALS)} ({DEFAULT_GOAL})")
    parser.add_argument("--target", default="cpu", help=f"one of {', '.join(hardware.TARGETS)} (cpu)")
    parser.add_argument("--recipe", default="", metavar="FILE", help="a recipe to try first, YAML or JSON")
    parser.add_argument("--store", default=STORE, help=f"s3://bucket/prefix or a folder (./{STORE})")
    parser.add_argument(
        "--max-attempts", type=int, default=5, metavar="N", help="the most attempts, 1 to 10 (5)"
    )
    parser.add_argument("--name", default="", help="name of the release (the model's)")
    parser.add_argument(
        "--tasks", help="lm-eval tasks, separated by commas (those of --evaluation, or trimtab_suite)"
    )
    parser.add_argument("--task-path", default="", metavar="DIR", help="a folder with lm-eval task YAMLs")
    parser.add_argument(
        "--evaluation", default="", metavar="FILE", help="items, windows and text to measure, YAML"
    )
    parser.add_argument("--require-signature", action="store_true", help="release nothing that cannot be signed")
    parser.add_argument("--runs", default=RUNS, metavar="DIR", help=f"logs and reports of runs (./{RUNS})")


def _run(arguments: argparse.Namespace, console: Console) -> int:
    parameters, backend = _parameters(arguments)
    console.print(f"engine   {backend}", soft_wrap=True, highlight=False)
    from trimtab.pipelines import local
    from trimtab.report import console_table

    outcome = local.run(parameters, Path(arguments.runs).absolute(), console)
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


def _checked(arguments: argparse.Namespace) -> tuple[str, Evaluation]:
    """Checks everything that can be checked in a second without the model, before anything long begins.

    Returns the recipe as it is written, and what is measured.
    """
    check_attempts(arguments.max_attempts)
    check_choice("goal", arguments.goal, GOALS)
    release_name(arguments.name, arguments.model)
    hardware.target(arguments.target)
    recipe = read(arguments.recipe, "recipe")
    if recipe:
        _check_texts(Recipe.parse(recipe))
    evaluation = read_evaluation(arguments.evaluation, arguments.tasks, arguments.task_path)
    _check_evaluation(evaluation, Recipe.parse(recipe or "{}"), arguments.max_attempts)
    return recipe, evaluation


def _parameters(arguments: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Returns what the pipeline is run with, and a sentence on the back end; refuses all that can be seen by now."""
    _check_signing(arguments.require_signature)
    recipe, evaluation = _checked(arguments)
    model, target = _model(arguments.model), hardware.target(arguments.target)
    if Path(model).is_dir():
        recipe, backend = local_backend.choose(recipe, target, lambda text: _ladder(arguments, text))
    else:  # of any other model nothing is known before it is fetched
        traffic.of(Recipe.parse(recipe or "{}").workload)
        recipe, backend = local_backend.choose(recipe, target)
    store = _store(arguments.store)
    parameters = {
        "model": model,
        "store": store,
        "goal": arguments.goal,
        "target": arguments.target,
        "recipe": recipe,
        "max_attempts": arguments.max_attempts,
        "name": release_name(arguments.name, model),
        "evaluation": evaluation.to_json(),
    }
    return parameters, backend


def _ladder(arguments: argparse.Namespace, recipe: str) -> dict[str, Any]:
    """Plans the run; refuses a recipe that the model or the target does not allow."""
    from trimtab.components.fetch.source import facts
    from trimtab.loop import decisions

    target, wanted = hardware.target(arguments.target), Recipe.parse(recipe or "{}")
    return decisions.outline(arguments.goal, facts(_model(arguments.model)), target, wanted)


def _compile(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.pipelines import package

    check_attempts(arguments.max_attempts)
    check_choice("pipeline", arguments.pipeline, tuple(package.PIPELINES))
    profile = read_profile(arguments.profile)
    write = package.write_objects if arguments.objects else package.write
    write(Path(arguments.output), arguments.max_attempts, arguments.image, profile, pipeline=arguments.pipeline)
    most = f"up to {arguments.max_attempts} attempts"
    console.print(f"wrote {arguments.output} for Kubeflow Pipelines >= 2.17.0, {most}")
    return 0


def _export_artifact(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.store import open_store
    from trimtab.store.artifact import export_artifact

    about = export_artifact(open_store(arguments.store), arguments.tree, Path(arguments.folder))
    size = f"{len(about.manifest.files)} files, {about.manifest.size / 1e6:,.1f} MB"
    console.print(f"wrote {arguments.folder}: {about.manifest.kind}, {size}", soft_wrap=True, highlight=False)
    return 0


def _import_artifact(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.store import open_store
    from trimtab.store.artifact import import_artifact

    store = open_store(arguments.store)
    store.check()
    tree, about = import_artifact(store, Path(arguments.folder))
    console.print(f"{about.manifest.kind}  {tree.uri}", soft_wrap=True, highlight=False)
    return 0


def _check_signing(required: bool) -> None:
    """A key that the gate could not use is refused now rather than after hours of work."""
    if required:
        os.environ[signing.REQUIRED] = "1"  # the gate's process inherits it
    if signing.signer() is None and signing.is_required():
        raise InputError(f"{signing.KEY}: is not set, and releases must be signed; `trimtab keygen FILE` makes a key")


def _check_texts(recipe: Recipe) -> None:
    """Text that is missing or empty is refused now rather than after the baseline."""
    from trimtab.runtime.text import documents

    texts = [("calibrate.text", source.text) for source in recipe.calibrate.sources if source.dataset is None]
    texts += [("distill.text", name) for name in recipe.distill.texts] if recipe.distill else []
    for field, name in texts:
        documents.check(name, field)


def _check_evaluation(evaluation: Evaluation, recipe: Recipe, attempts: int) -> None:
    """Tasks that are not there or too small, and a text that is none, are refused now, not after the baseline."""
    from trimtab.plan import dealing, task_sizes
    from trimtab.runtime.text import documents

    if evaluation.heldout != "builtin":
        documents.read(evaluation.heldout, ("", ""), field="heldout")
    dealing.deal(task_sizes.of(evaluation), evaluation, recipe.accept, attempts)


def _store(address: str) -> str:
    from trimtab.store import open_store

    store = open_store(address)
    store.check()
    return store.uri


def _model(model: str) -> str:
    """Makes a local path absolute, for the stages run elsewhere, and refuses a damaged model at once."""
    from trimtab.components.fetch.source import check

    return check(model)


if __name__ == "__main__":
    sys.exit(main())
