"""The `trimtab` command: each subject is a file beside this one; exit codes are in `trimtab.base.errors`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import Any

from rich.console import Console

from trimtab import __version__
from trimtab.base.errors import InputError, TrimtabError
from trimtab.base.errors import __doc__ as exit_codes
from trimtab.pipelines.commands import (
    artifact,
    cluster,
    compile,
    deploy,
    documents,
    plan,
    releases,
    run,
    serving,
    shelf,
    watching,
)

#: Each has `add`, which adds its commands to the parser, in the order of `trimtab --help`.
SUBJECTS = (run, plan, documents, compile, serving, cluster, deploy, artifact, releases, shelf, watching)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    try:
        arguments = _completed(parser()).parse_args(argv)
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


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command, with all subjects."""
    parser = _Parser(
        prog="trimtab",
        description="Makes a language model smaller and faster, and releases it only when it is still good.",
        epilog=exit_codes.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"trimtab {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for subject in SUBJECTS:
        subject.add(commands)
    return parser


def _completed(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Answers the shell that asks for completions, where argcomplete is installed: 'trimtab[completion]'."""
    with contextlib.suppress(ModuleNotFoundError):
        import argcomplete

        argcomplete.autocomplete(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
