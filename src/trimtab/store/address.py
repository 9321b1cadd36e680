"""Where a store is: `s3://bucket/prefix`, or a folder."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trimtab.errors import InputError

_TREE = re.compile(r"(.+)/trees/([0-9a-f]{64})")
_RELEASE = re.compile(r"(.+)/releases/([^/]+)/([0-9]+)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_S3 = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([\w!.*'()=/-]*))?", re.ASCII)


def canonical(address: str) -> str:
    """Returns the address of a store in the one form that URIs are made of: s3://… or file:///….

    Raises:
        InputError: another scheme, or not a valid bucket, prefix or path.
    """
    address = str(address)
    if address.startswith("s3://"):
        match = _S3.fullmatch(address)
        prefix = (match.group(2) or "").strip("/") if match else ""
        if not match or (prefix and any(part in ("", ".", "..") for part in prefix.split("/"))):
            raise InputError(f"the store {address!r} is not valid: write s3://bucket/prefix")
        return f"s3://{match.group(1)}/{prefix}".rstrip("/")
    return folder_of(address).as_uri()


def split_source(uri: str) -> tuple[str, str]:
    """Returns the bucket and the prefix that somebody else's s3:// URI names, character by character: a prefix may
    hold what a store's may not, such as spaces, '+' and accents.

    Raises:
        InputError: no valid bucket, or a prefix with an empty part, '.' or '..'.
    """
    match = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?", uri)
    prefix = (match.group(2) or "").strip("/") if match else ""
    if not match or (prefix and any(part in ("", ".", "..") for part in prefix.split("/"))):
        raise InputError(f"the model {uri!r} is not valid: write s3://bucket/prefix")
    return match.group(1), prefix


def folder_of(address: str) -> Path:
    """Returns the absolute folder that a path or a file:// URI names.

    Raises:
        InputError: neither of them.
    """
    path = address
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:/", address):
        parts = urlsplit(address)
        if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
            remedy = "write s3://bucket/prefix, file:///some/folder or /some/folder"
            raise InputError(f"the store {address!r} is not valid: {remedy}")
        path = unquote(parts.path)
    if not path or "\0" in path:
        raise InputError("the store's address is empty: write s3://bucket/prefix or /some/folder")
    # Not resolved: behind a link the store may move.
    return Path(path).expanduser().absolute()


def is_name(name: str) -> bool:
    """Whether a release or a pin may have that name."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str, what: str) -> str:
    """Returns the name of a release or of a pin, which is a part of paths and of URIs.

    Raises:
        InputError: it is not valid; calls it the name of `what`.
    """
    if not is_name(name):
        rule = "letters, digits, '.', '_', '-' of ASCII, a letter or a digit first, at most 128"
        raise InputError(f"the {what} name {name!r} is not valid: write {rule}")
    return name


def split_tree(uri: str) -> tuple[str, str] | None:
    """Returns the store's address and the digest of a tree's URI, None when it is not a tree's."""
    match = _TREE.fullmatch(uri)
    return (match.group(1), match.group(2)) if match else None


def split_release(uri: str) -> tuple[str, str, str] | None:
    """Returns the store's address, the name and the version of a release's URI, None when it is not one."""
    match = _RELEASE.fullmatch(uri)
    return match.groups() if match else None
