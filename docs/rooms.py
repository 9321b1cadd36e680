"""Writes the interface of each room into its README: `make docs`. With --check it only names what is stale.

Inputs, outputs, types and defaults come from the KFP components, descriptions from their docstrings, the rest from
metadata.yaml, which has the shape that github.com/kubeflow/pipelines-components asks of a component. What is written
stands between two marks; everything around them stays as it is.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Literal

import docstring_parser
import yaml
from kfp.dsl.base_component import BaseComponent
from kfp.dsl.structures import InputSpec, OutputSpec
from pydantic import AwareDatetime, Field, StrictBool, field_validator

from trimtab.base.errors import InputError
from trimtab.base.schema import Document
from trimtab.pipelines.optimize import optimize_pipeline
from trimtab.pipelines.rebuild import rebuild_pipeline

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- `make docs` writes what follows, out of the docstrings and metadata.yaml -->"
END = "<!-- what follows is written by hand -->"
#: How long a verification holds: behind it pipelines-components removes a component.
VERIFIED_FOR = timedelta(days=365)


class Dependency(Document):
    """A version of something, and all after it (>=), before it (<=) or it alone."""

    name: str
    version: str = Field(pattern=r"^(>=|<=|==)?\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$")


class Dependencies(Document):
    """What a room needs of Kubeflow, Pipelines among it, and of services beside it."""

    kubeflow: tuple[Dependency, ...]
    external_services: tuple[Dependency, ...] = ()

    @field_validator("kubeflow")
    @classmethod
    def _runs_in_pipelines(cls, given: tuple[Dependency, ...]) -> tuple[Dependency, ...]:
        if not any(dependency.name == "Pipelines" for dependency in given):
            raise ValueError("must hold a version of Pipelines; write {name: Pipelines, version: '>=2.17.0'}")
        return given


class Metadata(Document):
    """metadata.yaml; the order of the fields is asked for too."""

    name: str
    stability: Literal["experimental", "alpha", "beta", "stable"]
    dependencies: Dependencies
    tags: tuple[str, ...] = ()
    lastVerified: AwareDatetime
    ci: dict[Literal["skip_dependency_probe"], StrictBool] = {}
    links: dict[str, str] = {}

    @classmethod
    def read(cls, room: Path, now: datetime) -> Metadata:
        """Reads a room's metadata.yaml.

        Raises:
            InputError: a field is missing, unknown, out of place or invalid, the name is not the room's, or `now` is a
                year after the last verification, or before it.
        """
        path = room / "metadata.yaml"
        try:
            found = cls.parse(path.read_text(encoding="utf-8"))
            order = [name for name, field in cls.model_fields.items() if field.is_required()]
            if [name for name in yaml.safe_load(path.read_text(encoding="utf-8")) if name in order] != order:
                raise InputError(f"the fields stand in another order than {', '.join(order)}")
            if found.name != room.name:
                raise InputError(f"name: '{found.name}' is not the folder's; write {room.name}")
            if not timedelta() <= now - found.lastVerified < VERIFIED_FOR:
                raise InputError(f"lastVerified: {found.lastVerified:%Y-%m-%d} is no day of the last year; verify anew")
        except InputError as error:
            raise InputError(f"{path.name}: {error}") from None
        return found


def rooms() -> dict[Path, list[BaseComponent]]:
    """Returns each room's folder, and the components or pipelines that live there."""
    found = {
        path.parent: _defined_in(f"trimtab.components.{path.parent.name}.component")
        for path in sorted(ROOT.glob("components/*/component.py"))
    }
    steps = [_defined_in(f"trimtab.pipelines.{name}") for name in ("decisions", "rebuild")]
    return {**found, ROOT / "pipelines": [optimize_pipeline(1), rebuild_pipeline(1), *sum(steps, [])]}


def interface(metadata: Metadata, components: list[BaseComponent]) -> str:
    """Returns the Markdown that stands between the marks."""
    needs = [*metadata.dependencies.kubeflow, *metadata.dependencies.external_services]
    words = [f"Stability: {metadata.stability}", *(f"{need.name} {need.version}" for need in needs)]
    about = f"{', '.join(words)}. Last verified {metadata.lastVerified:%Y-%m-%d}."
    return "\n\n".join([*map(_section, components), about])


def renewed(readme: str, text: str) -> str:
    """Returns a README with another text between its marks.

    Raises:
        InputError: the marks are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"README.md lacks the two marks; put these lines below its title:\n{BEGIN}\n{END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _defined_in(module: str) -> list[BaseComponent]:
    values = vars(importlib.import_module(module)).values()
    return [v for v in values if isinstance(v, BaseComponent) and v.python_func.__module__ == module]


def _section(component: BaseComponent) -> str:
    function = getattr(component, "pipeline_func", None) or component.python_func
    docstring, spec = function.__doc__ or "", component.component_spec
    told = docstring_parser.parse(docstring)
    inputs, outputs = spec.inputs or {}, spec.outputs or {}
    about = {param.arg_name: param.description for param in told.params}
    returned = _returned(docstring, [name for name, port in outputs.items() if not _is_artifact(port)])
    given = [
        (f"`{name}`", _type(port), f"`{port.default!r}`" if port.optional else "required", about.get(name))
        for name, port in inputs.items()
    ]
    made = [
        (f"`{name}`", _type(port), (about if _is_artifact(port) else returned).get(name))
        for name, port in outputs.items()
    ]
    if silent := [line[0] for line in (*given, *made) if not line[-1]]:
        raise InputError(f"the docstring of {function.__name__} does not describe {', '.join(silent)}")
    parts = [
        f"## `{function.__name__}`",
        told.short_description,
        told.long_description,
        _table(("input", "type", "default", "meaning"), given),
        _table(("output", "type", "meaning"), _together(made)),
    ]
    return "\n\n".join(filter(None, parts))


def _returned(docstring: str, names: list[str]) -> dict[str, str]:
    """Returns what `Returns:` says of each: in lines `name: text` of its own, or of all together."""
    text = docstring.partition("Returns:\n")[2]
    own = dict(re.findall(r"^ *(\w+): (.*?)(?=\n *\w+: |\Z)", text, re.MULTILINE | re.DOTALL))
    return own if set(own) == set(names) else dict.fromkeys(names, text)


def _together(made: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Makes one line of neighbours of which the same is said."""
    groups = [list(lines) for _, lines in groupby(made, lambda line: line[-1])]
    return [tuple(", ".join(dict.fromkeys(cells)) for cells in zip(*lines, strict=True)) for lines in groups]


def _is_artifact(port: OutputSpec) -> bool:
    return port.type.startswith("system.")


def _type(port: InputSpec | OutputSpec) -> str:
    return port.type.removeprefix("system.").partition("@")[0]


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    cells = [[" ".join(cell.split()).replace("|", "&#124;") for cell in line] for line in (head, *lines)]
    first, *rows = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([first, "|---" * len(head) + "|", *rows]) if lines else ""


def main(arguments: list[str] | None = None) -> int:
    """Renews the READMEs; returns 1 where something is wrong or, with --check, stale."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a README is stale")
    check, faults = parser.parse_args(arguments).check, []
    for room, components in rooms().items():
        readme = room / "README.md"
        try:
            found = readme.read_text(encoding="utf-8")
            text = renewed(found, interface(Metadata.read(room, datetime.now(UTC)), components))
        except InputError as error:
            faults.append(f"{room.relative_to(ROOT)}: {error}")
            continue
        if text != found and check:
            faults.append(f"{readme.relative_to(ROOT)} is stale: run make docs")
        elif text != found:
            readme.write_text(text, encoding="utf-8")
            print(f"{readme.relative_to(ROOT)} is new")
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
