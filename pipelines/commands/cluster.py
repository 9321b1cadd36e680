"""The commands that speak to a Kubeflow Pipelines server: upload, submit, watch, schedule, schedules, unschedule."""

from __future__ import annotations

import argparse
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from trimtab.pipelines.cluster import reachable
from trimtab.pipelines.cluster.tags import refuse_tags
from trimtab.pipelines.commands import run
from trimtab.pipelines.inputs import Asked, check_choice, read, read_evaluation, read_profile
from trimtab.pipelines.package import PIPELINES
from trimtab.planning import dealing, task_sizes

if TYPE_CHECKING:
    from trimtab.pipelines.cluster.connection import Connection
    from trimtab.pipelines.cluster.upload import Uploaded

EXPERIMENT = "trimtab"


def add(commands: Any) -> None:
    """Adds the commands to the parser of `trimtab`."""
    upload = commands.add_parser("upload", help="bring a pipeline to a Kubeflow Pipelines server, once a version")
    add_package(upload)
    upload.set_defaults(command=_upload)

    submit = commands.add_parser("submit", help="run the pipeline on a cluster")
    _add_run(submit)
    submit.add_argument("--watch", action="store_true", help="follow the run, and exit with its result")
    submit.set_defaults(command=_submit)

    watch = commands.add_parser("watch", help="follow a run on a cluster; exits with its result")
    watch.add_argument("run", metavar="RUN", help="id of the run, or the address of its page")
    watch.set_defaults(command=_watch)

    schedule = commands.add_parser("schedule", help="run a pipeline again and again: rebuild, where something changed")
    schedule.add_argument("--cron", required=True, help="5 fields (minute first) or 6 (second first), UTC: '0 3 * * 1'")
    _add_run(schedule, pipeline="rebuild")
    schedule.set_defaults(command=_schedule)

    schedules = commands.add_parser("schedules", help="show the schedules of the namespace")
    schedules.set_defaults(command=_schedules)

    unschedule = commands.add_parser("unschedule", help="end a schedule; runs that it started go on")
    unschedule.add_argument("name", metavar="NAME", help="name or id of the schedule")
    unschedule.set_defaults(command=_unschedule)

    for command in (upload, submit, watch, schedule, schedules, unschedule):
        command.add_argument("--host", default="", help="https://… of the server (TRIMTAB_KFP_HOST, or kfp's own)")
        command.add_argument("--namespace", default="", help="your namespace, where each user has one")
        command.add_argument("--token", default="", help="bearer token; better in TRIMTAB_KFP_TOKEN, which ps hides")
        command.add_argument("--ca", default="", metavar="FILE", help="PEM file of the server's certificate authority")


def add_package(parser: argparse.ArgumentParser, pipeline: str = "optimize") -> None:
    known = " or ".join(PIPELINES)
    parser.add_argument("--pipeline", default=pipeline, metavar="NAME", help=f"{known} ({pipeline})")
    image = "container image of all stages (images.cpu of the profile, or TRIMTAB_IMAGE)"
    parser.add_argument("--image", default="", help=image)
    parser.add_argument("--profile", default="", metavar="FILE", help="what the cluster offers the stages, YAML")


def _add_run(parser: argparse.ArgumentParser, pipeline: str = "optimize") -> None:
    parser.add_argument("--model", required=True, help="s3://bucket/prefix, a hub id org/name, or a path there")
    parser.add_argument("--store", required=True, help="s3://bucket/prefix, or a folder of a shared volume")
    run.add_aim(parser)
    parser.add_argument("--rollout", default="", metavar="FILE", help="serve the release as `deploy` does, YAML")
    parser.add_argument("--registry", default="", metavar="URL", help="Kubeflow Model Registry to enter the release in")
    parser.add_argument("--name", default="", help="name of the release, the run and the schedule (the model's)")
    parser.add_argument("--experiment", default=EXPERIMENT, help=f"experiment that the runs belong to ({EXPERIMENT})")
    parser.add_argument("--service-account", default="", metavar="NAME", help="Kubernetes service account of the run")
    add_package(parser, pipeline)


def _connect(arguments: argparse.Namespace, console: Console) -> Connection:
    from trimtab.pipelines.cluster.connection import connect

    return connect(console, arguments.host, arguments.namespace, arguments.token, arguments.ca)


def _uploaded(arguments: argparse.Namespace, connection: Connection, unrolled: int) -> Uploaded:
    """Uploads the pipeline with as many attempts as may be needed: each costs a run pods, and its Workflow room."""
    from trimtab.pipelines import package
    from trimtab.pipelines.cluster.upload import upload

    profile = read_profile(arguments.profile)
    image = package.image_for(arguments.image, profile)
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / f"{arguments.pipeline}.yaml"
        package.write(compiled, unrolled, image, profile, pipeline=arguments.pipeline)
        return upload(connection, compiled, arguments.pipeline)


def _upload(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.pipelines.loop import MAX_ATTEMPTS

    check_choice("pipeline", arguments.pipeline, tuple(PIPELINES))
    uploaded = _uploaded(arguments, _connect(arguments, console), MAX_ATTEMPTS)
    print(f"{uploaded.name}  {'uploaded' if uploaded.new else 'is there already'}")
    return 0


def _submit(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.pipelines.cluster.upload import start

    parameters = _parameters(arguments)
    connection = _connect(arguments, console)
    uploaded = _uploaded(arguments, connection, parameters["max_attempts"])
    run_id = start(
        connection,
        uploaded,
        parameters,
        name=f"{parameters['name']} {parameters['goal']} {parameters['target']}",
        experiment=arguments.experiment,
        service_account=arguments.service_account,
    )
    print(f"{run_id}  {connection.host}/#/runs/details/{run_id}", flush=True)
    return _followed(connection, run_id, console) if arguments.watch else 0


def _watch(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.pipelines.cluster.watch import read_run_id

    run_id = read_run_id(arguments.run)
    return _followed(_connect(arguments, console), run_id, console)


def _followed(connection: Connection, run_id: str, console: Console) -> int:
    from trimtab.pipelines.cluster.watch import watch

    try:
        console.print(watch(connection, run_id))
    except KeyboardInterrupt:
        console.print(f"trimtab: not watched any more; the run goes on, and `trimtab watch {run_id}` follows it again")
        return 130
    return 0


def _schedule(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.pipelines.cluster.cron import Cron
    from trimtab.pipelines.cluster.schedule import schedule

    cron, parameters = Cron.parse(arguments.cron), _parameters(arguments)
    connection = _connect(arguments, console)
    name = parameters["name"]
    schedule(
        connection,
        _uploaded(arguments, connection, parameters["max_attempts"]),
        parameters,
        cron=cron,
        name=name,
        experiment=arguments.experiment,
        service_account=arguments.service_account,
    )
    print(f"{name}  {cron.text}  first at {cron.next(datetime.now(UTC).replace(tzinfo=None)):%Y-%m-%d %H:%M:%S} UTC")
    return 0


def _schedules(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.pipelines.cluster.schedule import schedules

    for item in schedules(_connect(arguments, console)):
        cron = item.trigger.cron_schedule.cron if item.trigger and item.trigger.cron_schedule else "–"
        print(f"{item.display_name}  {cron} UTC  {(item.status or item.mode or '').lower()}  {item.recurring_run_id}")
    return 0


def _unschedule(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.pipelines.cluster.schedule import unschedule

    unschedule(_connect(arguments, console), arguments.name)
    print(f"{arguments.name}  ended")
    return 0


def _parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """Checks what can be known without the cluster: model, store and volumes are seen only from there."""
    from trimtab.components.deployment import registry
    from trimtab.components.deployment.rollout import settings
    from trimtab.loop import decisions

    check_choice("pipeline", arguments.pipeline, tuple(PIPELINES))
    evaluation = read_evaluation(arguments.evaluation)
    asked = Asked(
        model=arguments.model,
        goal=arguments.goal,
        target=arguments.target,
        recipe=read(arguments.recipe, "recipe"),
        max_attempts=arguments.max_attempts,
        name=arguments.name,
        evaluation=evaluation,
    )
    reachable.check(arguments.model, arguments.store, asked.wanted, evaluation, read_profile(arguments.profile))
    decisions.check_limits(asked.wanted, read_profile(arguments.profile).prices)
    if own := task_sizes.of_own(evaluation):  # others are counted by the run's own plan
        dealing.deal(own, evaluation, asked.wanted.accept, asked.max_attempts)
    rollout = settings.asked(read(arguments.rollout, "rollout"), arguments.store)
    if arguments.registry:
        registry.check_address(arguments.registry)
    served = {"rollout": rollout.to_json() if rollout else "", "registry": arguments.registry}
    parameters = asked.parameters(store=arguments.store, **served)
    refuse_tags(parameters)
    return parameters
