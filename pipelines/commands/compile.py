"""The command `compile`: writes a pipeline for a Kubeflow Pipelines server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.pipelines.commands import cluster
from trimtab.pipelines.inputs import check_attempts, check_choice, read_profile


def add(commands: Any) -> None:
    """Adds the command to the parser of `trimtab`."""
    parser = commands.add_parser("compile", help="write a pipeline for a Kubeflow Pipelines backend >= 2.17.0")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the pipeline's YAML")
    parser.add_argument(
        "--max-attempts", type=int, default=10, metavar="N", help="attempts to unroll, 1 to 10 (10)"
    )
    parser.add_argument(
        "--objects", action="store_true", help="write objects for KFP in its Kubernetes-native mode"
    )
    cluster.add_package(parser)
    parser.set_defaults(command=_compile)


def _compile(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.pipelines import package

    check_attempts(arguments.max_attempts)
    check_choice("pipeline", arguments.pipeline, tuple(package.PIPELINES))
    profile = read_profile(arguments.profile)
    image = package.image_for(arguments.image, profile)
    write = package.write_objects if arguments.objects else package.write
    write(Path(arguments.output), arguments.max_attempts, image, profile, pipeline=arguments.pipeline)
    most = f"up to {arguments.max_attempts} attempts"
    console.print(f"wrote {arguments.output} for Kubeflow Pipelines >= 2.17.0, {most}")
    return 0
