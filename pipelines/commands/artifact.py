"""The commands `artifact export` and `artifact import`: carry a stage's result from one store to another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.base.errors import InputError
from trimtab.pipelines.api import STORE
from trimtab.pipelines.commands.arguments import add_store_of_uri


def add(commands: Any) -> None:
    """Adds the commands to the parser of `trimtab`."""
    artifact = commands.add_parser("artifact", help="carry a stage's result, such as a calibration, to another store")
    actions = artifact.add_subparsers(required=True, metavar="ACTION")
    export = actions.add_parser("export", help="write a tree and what is known of it into a folder")
    export.add_argument("tree", metavar="TREE", help="URI or digest of the tree, from the page of a run")
    export.add_argument("folder", metavar="FOLDER", help="a new folder")
    export.set_defaults(command=_export)
    import_ = actions.add_parser("import", help="put such a folder into a store, where the next run finds it")
    import_.add_argument("folder", metavar="FOLDER", help="what `trimtab artifact export` wrote")
    import_.set_defaults(command=_import)
    add_store_of_uri(export)
    import_.add_argument("--store", default=STORE, help=f"s3://bucket/prefix or a folder (./{STORE})")


def _export(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.store import open_store
    from trimtab.store.address import split_release, split_tree
    from trimtab.store.artifact import export_artifact

    if split_release(arguments.tree):
        raise InputError(f"tree: {arguments.tree} is a release; write trimtab pull {arguments.tree} {arguments.folder}")
    of = split_tree(arguments.tree)
    store = open_store(arguments.store or (of[0] if of else STORE))
    about = export_artifact(store, arguments.tree, Path(arguments.folder))
    size = f"{len(about.manifest.files)} files, {about.manifest.size / 1e6:,.1f} MB"
    console.print(f"wrote {arguments.folder}: {about.manifest.kind}, {size}", soft_wrap=True, highlight=False)
    return 0


def _import(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.store import open_store
    from trimtab.store.artifact import import_artifact

    store = open_store(arguments.store)
    store.check()
    tree, about = import_artifact(store, Path(arguments.folder))
    console.print(f"{about.manifest.kind}  {tree.uri}", soft_wrap=True, highlight=False)
    return 0
