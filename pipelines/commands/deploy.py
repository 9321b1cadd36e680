"""The command `trimtab deploy`: a release of the store becomes an InferenceService of a cluster."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from trimtab.base.errors import InputError
from trimtab.pipelines.commands.arguments import add_keys
from trimtab.pipelines.inputs import read
from trimtab.store.address import split_release


def add(commands: Any) -> None:
    """Adds the command to the parser of `trimtab`."""
    deploy = commands.add_parser("deploy", help="serve a release on KServe: canary, comparison, promotion or rollback")
    deploy.add_argument("release", metavar="RELEASE", help="its URI: s3://bucket/prefix/releases/NAME/VERSION")
    deploy.add_argument("--rollout", required=True, metavar="FILE", help="service, image, limits and prompts, YAML")
    add_keys(deploy)
    deploy.add_argument("--context", default="", help="context of the kubeconfig (the current one)")
    instead = deploy.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print what would change, and change nothing")
    instead.add_argument("--approve", action="store_true", help="let a rollout of it go on that waits for approval")
    instead.add_argument("--refuse", action="store_true", help="let such a rollout roll back")
    deploy.add_argument("--by", default="", metavar="NAME", help="who approves or refuses, kept with the answer")
    deploy.add_argument("--force", action="store_true", help="take over fields that someone else owns")
    deploy.add_argument("--registry", default="", metavar="URL", help="Kubeflow Model Registry to enter it in then")
    deploy.set_defaults(command=_deploy)


def _deploy(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.components.deployment.registry import register
    from trimtab.components.deployment.rollout import approval, delivery
    from trimtab.components.deployment.rollout.canary import difference, roll_out
    from trimtab.components.deployment.rollout.cluster import Cluster
    from trimtab.components.deployment.rollout.settings import Rollout

    rollout = Rollout.parse(read(arguments.rollout, "rollout"))
    answer = "approved" if arguments.approve else "refused" if arguments.refuse else ""
    if arguments.by and not answer:
        raise InputError(f"by: '{arguments.by}' answers nothing; write --approve or --refuse with it")
    release = arguments.release
    store = delivery.locate(release)
    if answer:  # the rollout itself has verified what it waits for
        digest = store.read_release(release)["artifact"]["digest"]
        cluster = Cluster.connect(rollout.namespace, arguments.context)
        approval.decide(cluster, rollout.service, digest, answer, arguments.by)
        print(f"{rollout.service}: {answer} {approval.short(digest)}")
        return 0
    digest = delivery.proven(store, release, [*rollout.keys, *arguments.key])
    cluster = Cluster.connect(rollout.namespace, arguments.context)
    if arguments.dry_run:
        shown = difference(cluster, rollout, store.uri, digest, arguments.force)
        print(shown or f"{rollout.service} would stay as it is")
        return 0
    with delivery.unwinding():
        print(roll_out(cluster, rollout, store.uri, digest, arguments.force), flush=True)
    delivery.remember(store, rollout, digest)
    if arguments.registry:
        _, name, version = split_release(release)
        new = register(arguments.registry, name, version, release, store.read_release(release))
        print(f"{name} {version} {'entered in' if new else 'is already in'} the registry")
    return 0
