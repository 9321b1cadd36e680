"""Arguments that several commands have, each described once."""

from __future__ import annotations

import argparse

from trimtab.pipelines.api import STORE


def add_release(parser: argparse.ArgumentParser) -> None:
    """Adds the release that a command is about."""
    parser.add_argument("release", metavar="RELEASE", help="URI of a release, name/version, or a name for its newest")


def add_store_of_uri(parser: argparse.ArgumentParser) -> None:
    """Adds the store of a command whose subject may be a URI, which names it."""
    parser.add_argument("--store", default="", help=f"s3://bucket/prefix or a folder (the URI's, or ./{STORE})")


def add_keys(parser: argparse.ArgumentParser) -> None:
    """Adds the keys that a signature is checked with."""
    parser.add_argument(
        "--key", action="append", default=[], metavar="PUB", help="a public key to trust, PEM; may be repeated"
    )
