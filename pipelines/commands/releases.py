"""The commands that answer for what is in a store: verify, keygen and gc."""

from __future__ import annotations

import argparse
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from trimtab.base import signing
from trimtab.base.errors import InputError
from trimtab.pipelines import api
from trimtab.pipelines.api import STORE
from trimtab.pipelines.commands.arguments import add_keys, add_release, add_store_of_uri
from trimtab.store import open_store


def add(commands: Any) -> None:
    """Adds the commands to the parser of `trimtab`."""
    verify = commands.add_parser("verify", help="check a release: signed, whole, and accepted when judged anew")
    add_release(verify)
    add_store_of_uri(verify)
    add_keys(verify)
    verify.add_argument(
        "--validation-key", action="append", default=[], metavar="PUB", help="one that validation must have signed with"
    )
    verify.add_argument("--max-age", type=_age, metavar="AGE", help="refuse what was signed longer ago: 90d or 12h")
    verify.set_defaults(command=_verify)

    keygen = commands.add_parser("keygen", help="make a key pair for signing releases")
    keygen.add_argument("file", type=Path, metavar="FILE", help="the private key; FILE.pub is the public one")
    keygen.set_defaults(command=_keygen)

    gc = commands.add_parser("gc", help="remove what no release, run or schedule refers to from a store")
    gc.add_argument("--store", default=STORE, help=f"s3://bucket/prefix or a folder (./{STORE})")
    gc.add_argument("--older-than", type=_age, default="14d", metavar="AGE", help="keep what is younger (14d)")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    gc.set_defaults(command=_gc)


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    found = api.verify(
        arguments.release, arguments.store, arguments.key, arguments.max_age, arguments.validation_key
    )
    said, out = found.predicate, Console(soft_wrap=True, highlight=False)
    until = f"{said.issued:%Y-%m-%d %H:%M}, until {said.expires:%Y-%m-%d}"
    signed = f"with {found.signed_by[:12]}, {until}" if found.signed_by else "not checked, for no --key was given"
    out.print(f"verified  {found.uri}")
    out.print(f"artifact  {said.artifact.digest}")
    out.print(f"hashed    {found.files} files, {found.bytes / 1e6:,.1f} MB, with the evidence and the answers")
    out.print(f"judged    {said.verdict['outcome']} again: {said.verdict['reason']}", markup=False)
    answers = f"{len(said.measured)} measurements"
    chain = f"signed by validation with {found.measured_by[:12]}" if found.measured_by else "signed by nobody"
    asked = "asked as planned" if found.keys_recomputed else "asked as the gate says, by another version of trimtab"
    out.print(f"measured  {answers}, {chain}, {asked}")
    out.print(f"papers    {', '.join(found.papers) or 'none'}")
    out.print(f"signed    {signed}")
    return 0


def _keygen(arguments: argparse.Namespace, console: Console) -> int:
    public, identity = signing.generate(arguments.file)
    out = Console(soft_wrap=True, highlight=False)
    out.print(f"private  {arguments.file}: for the gate alone, as {signing.KEY}")
    out.print(f"public   {public}: for trimtab verify --key")
    out.print(f"id       {identity}")
    return 0


def _gc(arguments: argparse.Namespace, console: Console) -> int:
    from trimtab.store.garbage import collect

    store = open_store(arguments.store)
    garbage = collect(store, arguments.older_than, arguments.dry_run)
    if not garbage.kept and not garbage.manifests:
        console.print(f"there is no tree in {store.uri}; if there should be, correct --store", soft_wrap=True)
    out = Console(soft_wrap=True, highlight=False)
    verb = "would remove" if arguments.dry_run else "removed"
    kinds = ", ".join(f"{number} {kind}" for kind, number in garbage.kinds.items())
    out.print(f"{verb}  {len(garbage.manifests)} trees{f' ({kinds})' if kinds else ''}, {len(garbage.records)} results")
    out.print(f"freeing  {garbage.bytes / 1e6:,.1f} MB in {len(garbage.blobs)} files")
    if garbage.linked:
        out.print(f"not yet  {garbage.linked / 1e6:,.1f} MB, which a running process uses in the cache of a node")
    out.print(f"keeping  {garbage.kept} trees that are younger or referred to")
    return 0


def _age(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,6})([dh])", text)
    if not match:
        raise InputError(f"age: '{text}' is not valid; write days or hours, such as 90d or 12h")
    return timedelta(**{{"d": "days", "h": "hours"}[match[2]]: int(match[1])})
