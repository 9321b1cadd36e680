"""The commands recipe, workload, evaluation, rollout and profile: the schema of a document that a user writes, an
example, and whether a file is one."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console

from trimtab.pipelines.documents import DOCUMENTS
from trimtab.pipelines.inputs import read


def add(commands: Any) -> None:
    """Adds a command for each document to the parser of `trimtab`."""
    for document in DOCUMENTS.values():
        about = f"{document.purpose}: its schema, an example, or whether a file is one"
        parser = commands.add_parser(document.name, help=about, description=about)
        asked = parser.add_mutually_exclusive_group(required=True)
        asked.add_argument("--schema", action="store_true", help="print its JSON schema, with what each field means")
        asked.add_argument("--example", action="store_true", help="print one that is valid, YAML")
        asked.add_argument("--check", metavar="FILE", help="say whether a file is one, and what is wrong")
        parser.set_defaults(command=_document, document=document.name)


def _document(arguments: argparse.Namespace, console: Console) -> int:
    document = DOCUMENTS[arguments.document]
    if arguments.check is not None:
        document.parse(read(arguments.check, document.name))
        print(f"{arguments.check} is a valid {document.name}")
    elif arguments.schema:
        print(json.dumps(document.schema, indent=2, ensure_ascii=False))
    else:
        print(document.example, end="")
    return 0
