"""The tables of arguments beside this file: what TensorRT-LLM accepts in which version, and what it takes for granted.

The LLM API refuses a key that it does not know, and a default may change from one version to the next. So trimtab
writes what differs from the defaults and no more, and refuses before TensorRT-LLM does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from trimtab.base.errors import InputError, nearest
from trimtab.catalog.contracts import version as versions

_TYPES = {"int": int, "float": (int, float), "bool": bool, "str": str, "list": list, "dict": dict, "flag": bool}


@dataclass(frozen=True)
class Argument:
    """One argument: its type as the table writes it, its default, the values it may have (empty: any), its versions."""

    type: str
    default: Any = None
    values: tuple[Any, ...] = ()
    since: str | None = None
    until: str | None = None
    required: bool = False


Table = dict[str, Argument]


@cache
def tables(name: str) -> dict[str, Table]:
    """Returns the tables of a contract, "llm_args" or "trtllm_build": table -> argument -> what it is."""
    text = resources.files("trimtab.catalog.contracts").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    contract = yaml.safe_load(text)
    return {table: {key: _argument(entry) for key, entry in rows.items()} for table, rows in contract.items()}


def _argument(entry: Mapping[str, Any]) -> Argument:
    return Argument(**{**entry, "values": tuple(entry.get("values", ()))})


def llm_args(arguments: Mapping[str, Any], version: str) -> dict[str, Any]:
    """Returns those of the LLM API's arguments that differ from its defaults, nested ones too.

    Raises:
        InputError: a key that the version does not have, or a value that its key cannot have.
    """
    return _differing("llm_args", "LlmArgs", arguments, version, "")


def trtllm_build(arguments: Mapping[str, Any], version: str) -> list[str]:
    """Returns the command line of `trtllm-build`; names are written without dashes, flags as booleans.

    Raises:
        InputError: no such argument, a value that it cannot have, or a version that builds no engines.
    """
    if reason := versions.refusal("trtllm-legacy", version):
        raise InputError(reason)
    command = ["trtllm-build"]
    for name, value in _differing("trtllm_build", "Build", arguments, version, "").items():
        if isinstance(value, bool):  # only flags are, and only those that are on differ
            command.append(f"--{name}")
        else:
            values = value if isinstance(value, list) else [value]
            command += [f"--{name}", *map(str, values)]
    return command


def _differing(contract: str, table: str, given: Mapping[str, Any], version: str, path: str) -> dict[str, Any]:
    known, found = tables(contract)[table], {}
    parsed = versions.parse(version)
    for name, value in given.items():
        where = f"{path}{name}"
        if name not in known:
            raise InputError(f"{where}: TensorRT-LLM has no such argument; {nearest(name, known)}")
        argument = known[name]
        if argument.type in tables(contract):
            value = _differing(contract, argument.type, value or {}, version, f"{where}.") or None
        else:
            _check(where, argument, value)
        if value == argument.default and not argument.required:
            continue
        if not versions.within(parsed, argument.since, argument.until):
            range_ = f"from {argument.since} on" if argument.since else f"up to {argument.until}"
            raise InputError(f"{where}: is an argument {range_}, and this is TensorRT-LLM {version}; leave it out")
        found[name] = value
    return found


def _check(where: str, argument: Argument, value: Any) -> None:
    kind, _, nothing = argument.type.partition(" | ")
    if value is None and nothing:
        return
    # In Python a bool is an int.
    right = isinstance(value, _TYPES[kind]) and (kind in ("bool", "flag") or not isinstance(value, bool))
    if not right:
        raise InputError(f"{where}: {value!r} is not valid; write {'an' if kind == 'int' else 'a'} {kind}")
    if argument.values and value not in argument.values:
        raise InputError(f"{where}: {value!r} is not valid; {nearest(value, argument.values)}")
