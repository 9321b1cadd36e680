"""The command `trimtab deploy`: a release of the store becomes an InferenceService of a cluster."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from trimtab import signing
from trimtab.errors import InputError
from trimtab.pipelines.inputs import read


def add(commands: Any) -> None:
    """Adds the command to the parser of `trimtab`."""
    deploy = commands.add_parser("deploy", help="serve a release on KServe: canary, comparison, promotion or rollback")
    deploy.add_argument("release", metavar="RELEASE", help="its URI: s3://bucket/prefix/releases/NAME/VERSION")
    deploy.add_argument("--rollout", required=True, metavar="FILE", help="service, image, limits and prompts, YAML")
    deploy.add_argument(
        "--key", action="append", default=[], metavar="PUB", help="a public key to trust, PEM; may be repeated"
    )
    deploy.add_argument("--context", default="", help="context of the kubeconfig (the current one)")
    deploy.add_argument("--dry-run", action="store_true", help="print what would change, and change nothing")
    deploy.add_argument("--force", action="store_true", help="take over fields that someone else owns")
    deploy.add_argument("--registry", default="", metavar="URL", help="Kubeflow Model Registry to enter it in then")
    deploy.set_defaults(command=_deploy)


def _deploy(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.components.deployment.cluster import Cluster
    from trimtab.components.deployment.registry import register
    from trimtab.components.deployment.rollout import difference, roll_out
    from trimtab.components.deployment.serving import Rollout
    from trimtab.store import open_store
    from trimtab.store.address import split_release
    from trimtab.verification import verify

    rollout = Rollout.parse(read(arguments.rollout, "rollout"))
    parts = split_release(arguments.release)
    if not parts or not parts[0].startswith("s3://"):
        raise InputError(
            f"release: '{arguments.release}' cannot be read from a cluster; write s3://bucket/prefix/releases/NAME/VERSION"
        )
    store = open_store(parts[0])
    keys = [signing.public_key(path) for path in arguments.key]
    digest = verify(store, arguments.release, keys).predicate.artifact.digest
    cluster = Cluster.connect(rollout.namespace, arguments.context)
    if arguments.dry_run:
        shown = difference(cluster, rollout, store.uri, digest, arguments.force)
        print(shown or f"{rollout.service} would stay as it is")
        return 0
    print(roll_out(cluster, rollout, store.uri, digest, arguments.force), flush=True)
    if arguments.registry:
        _, name, version = parts
        new = register(arguments.registry, name, version, arguments.release, store.read_release(arguments.release))
        print(f"{name} {version} {'entered in' if new else 'is already in'} the registry")
    return 0
