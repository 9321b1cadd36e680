"""What an error of pydantic means to a person: where, what was written, and what to write instead.

A remedy is tried before it is told: "write X" stands in a message only where X is accepted in that place.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Tag, ValidationError

from trimtab.base.errors import TrimtabError, nearest, written

#: Kinds of error of a value that should be a section or a list.
_SECTION = ("model_type", "model_attributes_type", "dict_type", "union_tag_not_found")
_LIST = ("tuple_type", "list_type")

Path = tuple[Any, ...]


def explain(cls: type[BaseModel], document: Mapping[str, Any], item: Mapping[str, Any]) -> str:
    """Returns one error of validating `document` as `cls` as a sentence."""
    kind, context, value = item["type"], item.get("ctx", {}), item["input"]
    place = _walk(cls, item["loc"], of_key=kind in ("extra_forbidden", "missing"))
    path, where = place.path, ".".join(map(str, place.path)) or cls.__name__.lower()
    said = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind == "extra_forbidden":
        return f"{where}: unknown key '{path[-1]}'; {_other_key(cls, place, value)}"
    if kind == "missing" and isinstance(path[-1], int):
        return _wrong_length(cls, document, path[:-1], value)
    if kind == "missing":
        return f"{where}: is required{_one_of(place.holders, path[-1])}"
    if kind == "union_tag_not_found" and isinstance(value, Mapping):
        tag = context["discriminator"].strip("'")
        return f"{where}.{tag}: is required{_one_of(place.sections, tag)}"
    if not path:  # what two sections say together; the message names them, and the input is the whole document
        return said
    if value is None and kind != "literal_error":
        asked = place.fields if place.sections else "a value"
        fields = [model.model_fields[path[-1]] for model in place.holders if path[-1] in model.model_fields]
        needed = any(field.is_required() for field in fields)
        return f"{where}: is empty; {'' if needed else 'remove it, or '}write {asked}"
    if kind == "too_long" and isinstance(value, Sequence):
        return _wrong_length(cls, document, path, value)
    if kind == "literal_error":
        return f"{where}: {value!r} is not valid; {nearest(value, _listed(context['expected']))}"
    if kind == "union_tag_invalid":
        tag, choices = context["discriminator"].strip("'"), _listed(context["expected_tags"])
        return f"{where}.{tag}: {value[tag]!r} is not valid; {nearest(value[tag], choices)}"
    if kind in _SECTION:
        remedy = _accepted(cls, document, path, _as_section(place.sections, value))
        what = place.fields if place.sections else "names and their values, such as {name: value}"
        return f"{where}: {value!r} is not a mapping; write {remedy or what}"
    if kind in _LIST:
        default = list(_default(cls, path) or ())
        tries = [] if isinstance(value, bool) or value == "" else [[value], [value] * len(default)]
        remedy = _accepted(cls, document, path, [*tries, *filter(None, [default])])
        return f"{where}: {value!r} is not a list; write {remedy or 'one in brackets'}"
    remedy = _accepted(cls, document, path, _meant(kind, context, value))
    if kind == "string_type" and remedy:
        said = "is not how YAML reads a text without quotes"
    return f"{where}: {value!r} {said}" + (f"; write {remedy}" if remedy else "")


def _meant(kind: str, context: Mapping[str, Any], value: Any) -> Iterable[Any]:
    """Yields what somebody may have meant who wrote a value of the wrong type, or one out of range."""
    if kind == "string_type" and not isinstance(value, bool | Mapping | list):
        yield str(value)
    if kind in ("int_parsing", "int_type", "float_parsing", "float_type") and isinstance(value, str):
        yield from _as_number(value)
    is_share = kind in ("less_than", "less_than_equal") and 1 in context.values()
    if is_share and isinstance(value, int | float) and value >= 2:
        yield value / 100  # written in percent


def _accepted(cls: type[BaseModel], document: Mapping[str, Any], path: Path, tries: Iterable[Any]) -> str | None:
    """Returns the first of these values that is accepted in that place, as it is written into YAML."""
    for value in tries:
        try:
            cls.model_validate(_replaced(document, path, value))
        except ValidationError as error:
            if any(_walk(cls, item["loc"]).path[: len(path)] == path for item in error.errors()):
                continue
        except TrimtabError:
            continue
        return in_yaml(value)
    return None


def _replaced(document: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    inner = _replaced(document[path[0]], path[1:], value)
    if isinstance(document, Mapping):
        return {**document, path[0]: inner}
    return [*document[: path[0]], inner, *document[path[0] + 1 :]]


def in_yaml(value: Any) -> str:
    """Returns a value as it is written into YAML on one line."""
    if isinstance(value, str):
        return written(value)
    text = yaml.safe_dump([value], default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.strip()[1:-1]


def _as_section(models: Sequence[type[BaseModel]], value: Any) -> Iterable[dict[str, Any]]:
    """Yields what somebody may have meant who wrote a section's one important value in its place.

    A name may be the value of any field that takes it, a number that of the first one alone.
    """
    is_name = isinstance(value, str) and value and not list(_as_number(value))
    if not is_name and (isinstance(value, bool) or not isinstance(value, int | float)):
        return
    for model in models:
        names = sorted(model.model_fields, key=lambda name: not model.model_fields[name].is_required())
        for name in names if is_name else names[:1]:
            yield {name: value}
            if is_name:
                yield {name: value.lower()}


def _as_number(value: str) -> Iterable[int | float]:
    """Yields the number that a text was meant to be: "95%", "0,95", or "1e6", which YAML 1.1 reads as a text."""
    text = value.strip().replace(",", ".")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        return
    number = number / 100 if text.endswith("%") else number
    yield int(number) if number.is_integer() else number


def _other_key(cls: type[BaseModel], place: _Place, value: Any) -> str:
    """Says what an unknown key may be: the document's own name, a field of another section, or a misspelt field."""
    name = place.path[-1]
    if place.path == (cls.__name__.lower(),) and isinstance(value, Mapping):
        return f"the file is the {name} itself: leave out '{name}:', and write its fields at the beginning of a line"
    others = [other for other in _places(cls, name) if other != place.path[:-1]]
    if others and not any(_same(name, key) for key in place.keys):
        inside = " or ".join(f"inside '{'.'.join(other)}'" if other else "outside of all sections" for other in others)
        return f"write it {inside} (valid here: {', '.join(place.keys)})"
    return nearest(name, place.keys)


def _same(name: Any, other: str) -> bool:
    return str(name).casefold().replace("-", "_") == other


def _places(cls: type[BaseModel], name: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Returns the sections that have a field of this name."""
    found = [at] if name in cls.model_fields else []
    for section, field in cls.model_fields.items():
        for model in _models(field.annotation):
            found += [place for place in _places(model, name, (*at, section)) if place not in found]
    return found


def _wrong_length(cls: type[BaseModel], document: Mapping[str, Any], path: Path, value: Sequence[Any]) -> str:
    where, default = ".".join(map(str, path)), _default(cls, path)
    remedy = _accepted(cls, document, path, [list(default)] if default else [])
    wanted = f" and {len(default)} are needed; write such as {remedy}" if remedy else ", which is not as many as needed"
    return f"{where}: {list(value)!r} has {len(value)} entries{wanted}"


def _default(cls: type[BaseModel], path: Path) -> tuple[Any, ...] | None:
    """Returns the default of a field that is a tuple."""
    fields = [model.model_fields.get(path[-1]) for model in _walk(cls, path).holders]
    return next((field.default for field in fields if field and isinstance(field.default, tuple)), None)


def _one_of(models: Sequence[type[BaseModel]], name: Any) -> str:
    """Returns the texts that a field which is missing may be, "" where it is no Literal of texts."""
    fields = [model.model_fields[name] for model in models if name in model.model_fields]
    choices = [choice for field in fields for choice in get_args(field.annotation) if isinstance(choice, str)]
    return f"; write one of: {', '.join(choices)}" if choices else ""


def _listed(text: str) -> list[Any]:
    """Reads pydantic's "'a', 'b' or 'c'", of texts or of numbers."""
    return list(ast.literal_eval(f"[{text.replace(' or ', ', ')}]"))


@dataclass(frozen=True)
class _Place:
    """A place in a document: its path as the user wrote it, the sections that hold it, and those that it may be."""

    path: Path
    holders: list[type[BaseModel]]
    sections: list[type[BaseModel]]

    @property
    def keys(self) -> list[str]:
        return sorted({name for model in self.holders for name in model.model_fields})

    @property
    def fields(self) -> str:
        return f"its fields: {', '.join(sorted({name for model in self.sections for name in model.model_fields}))}"


def _walk(cls: type[BaseModel], location: tuple[Any, ...], of_key: bool = False) -> _Place:
    """Follows pydantic's location, of which the last step is a key that may not exist where `of_key`.

    Pydantic puts the chosen member of a tagged union into the location ('prune', 'depth', 'blocks', or
    'calibrate', 'text', 'mix', 0), and each member that was tried of any other ('stop', 'list[str]', 0); the user wrote
    no such step.
    """
    classes, path, tags, members = [cls], [], set(), []
    for number, part in enumerate(location):
        last = number == len(location) - 1
        if part in tags or (isinstance(part, str) and "[" in part and path):
            tags = set()
            continue
        fields = [c.model_fields[part].annotation for c in classes if part in c.model_fields]
        if not fields and isinstance(part, str) and len(classes) > 1 and not (last and of_key):
            classes = members = [c for c in classes if _is_tagged(c, part)] or classes
            continue
        path.append(part)
        if isinstance(part, int) and not fields:  # an entry of a list, whose annotation was looked at with the list
            continue
        members = [model for annotation in fields for model in _models(annotation)]
        tags = {tag for annotation in fields for tag in (*_tags(annotation), *_plain(annotation))}
        if members and not last:
            classes = members
    return _Place(tuple(path), classes, members)


def _is_tagged(model: type[BaseModel], tag: str) -> bool:
    """Whether a member of a union is told by this tag: the value of a field that must be written."""
    fields = model.model_fields.values()
    return any(field.is_required() and tag in get_args(field.annotation) for field in fields)


def _tags(annotation: Any) -> list[str]:
    """The tags of a union that a function tells apart."""
    own = [item.tag for item in getattr(annotation, "__metadata__", ()) if isinstance(item, Tag)]
    return own + [tag for part in getattr(annotation, "__args__", ()) for tag in _tags(part)]


def _plain(annotation: Any) -> list[str]:
    """How pydantic calls the plain members of a union, "str" and alike; of a single type it says nothing."""
    members = [part for part in getattr(annotation, "__args__", ()) if part is not type(None)]
    return [part.__name__ for part in members if part in (str, int, float, bool)] if len(members) > 1 else []


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models(part)]
