"""The commands `releases`, `pull` and `push`: which releases there are, taking one back, and taking one with its papers
into a folder or to a registry of containers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.base.errors import InputError
from trimtab.pipelines import api
from trimtab.pipelines.commands.arguments import add_keys, add_release, add_store_of_uri


def add(commands: Any) -> None:
    """Adds the commands to the parser of `trimtab`."""
    listed = commands.add_parser("releases", help="list the releases of a store, or withdraw some")
    listed.add_argument("name", nargs="?", default="", metavar="NAME", help="a name, a version of it, or a URI (all)")
    add_store_of_uri(listed)
    listed.add_argument("--withdraw", action="store_true", help="take it back: gc may remove it then")
    listed.add_argument("--keep", type=int, metavar="N", help="with --withdraw NAME: all but the newest N")
    listed.add_argument("--reason", default="withdrawn by hand", help="why, kept with it")
    listed.set_defaults(command=_releases)

    pull = commands.add_parser("pull", help="lay a release's files and papers into a folder, after checking it")
    add_release(pull)
    pull.add_argument("folder", metavar="FOLDER", help="a new folder")
    add_store_of_uri(pull)
    add_keys(pull)
    pull.set_defaults(command=_pull)

    push = commands.add_parser("push", help="pack a release with its papers as an OCI image or artifact, and push it")
    add_release(push)
    push.add_argument("image", metavar="IMAGE", help="REGISTRY/REPOSITORY:TAG, or oci:FOLDER for a new layout on disk")
    add_store_of_uri(push)
    add_keys(push)
    push.add_argument(
        "--form", default="modelcar", metavar="FORM", help="modelcar for KServe, or artifact for `oras pull` (modelcar)"
    )
    push.add_argument("--plain-http", action="store_true", help="the registry speaks no TLS")
    push.set_defaults(command=_push)


def _releases(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.keep is not None and not arguments.withdraw:
        raise InputError(f"keep: {arguments.keep} keeps nothing by itself; write --withdraw with it")
    if arguments.withdraw:
        if not arguments.name:
            raise InputError("name: is missing; write the release to withdraw, NAME/VERSION, or NAME with --keep N")
        for uri in api.withdraw(arguments.name, arguments.store, keep=arguments.keep, reason=arguments.reason):
            print(f"withdrawn  {uri}")
        return 0
    out, rows = Console(soft_wrap=True, highlight=False), api.releases(arguments.name, arguments.store)
    for row in rows:
        if row.withdrawn:
            out.print(f"{row.name}/{row.version}  withdrawn on {row.withdrawn}", markup=False)
            continue
        when = f"{row.issued:%Y-%m-%d %H:%M}" if row.issued else "–"
        signed = "unsigned" if row.signed_by in ("", "unsigned") else f"signed with {row.signed_by[:12]}"
        serves = f", serves {', '.join(row.serves)}" if row.serves else ""
        out.print(f"{row.name}/{row.version}  {when}  {row.recipe}  {row.bytes / 1e6:,.1f} MB  {signed}{serves}")
        out.print(f"    {row.goal}: {row.reason}", markup=False)
    if not rows:
        console.print("there is no release; if there should be one, correct --store or the name", soft_wrap=True)
    return 0


def _pull(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.release import model_signature, papers

    found, names = api.pull(arguments.release, Path(arguments.folder), arguments.store, arguments.key)
    out = Console(soft_wrap=True, highlight=False)
    out.print(f"pulled    {found.uri} into {arguments.folder}: {len(names)} files")
    signed = f"with {found.signed_by[:12]}" if found.signed_by else "not checked, for no --key was given"
    out.print(f"signed    {signed}")
    if papers.CARD in names:
        out.print(f"read      {arguments.folder}/{papers.CARD}")
    if model_signature.FILE in names:
        signature = f"{arguments.folder}/{model_signature.FILE}"
        out.print(f"check     model_signing verify key {arguments.folder} --signature {signature} --public_key PUB")
    out.print(f"serve     trimtab serve {arguments.folder}")
    return 0


def _push(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.pipelines.pushing import LAYOUT, push

    pushed = push(
        arguments.release, arguments.image, arguments.store, arguments.key,
        form=arguments.form, plain_http=arguments.plain_http,
    )  # fmt: skip
    # Not an emoji: `:car:` may well stand in the name of an image.
    out, found = Console(soft_wrap=True, highlight=False, markup=False, emoji=False), pushed.found
    out.print(f"pushed    {found.uri} to {pushed.where}")
    out.print(f"digest    {pushed.digest}")
    signed = f"with {found.signed_by[:12]}" if found.signed_by else "not checked, for no --key was given"
    out.print(f"signed    {signed}")
    if pushed.where.startswith(LAYOUT):
        out.print(f"copy      skopeo copy --all --preserve-digests {pushed.where}:latest docker://REGISTRY/REPOSITORY:TAG")
    elif arguments.form == "artifact":
        out.print(f"take      oras pull {pushed.where}")
    else:
        out.print(f"serve     trimtab serve-config {found.uri} FOLDER --model-uri oci://{pushed.where}")
    return 0
