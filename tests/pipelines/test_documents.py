"""The documents that a user writes: every field described, each with an example and a JSON schema that agree."""

from __future__ import annotations

import json

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from trimtab.base.user_document import UserDocument
from trimtab.pipelines.commands import main
from trimtab.pipelines.documents import DOCUMENTS

ALL = pytest.mark.parametrize("name", DOCUMENTS)


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A document's model and those of all its sections."""
    found, left = set(), [model]
    while left:
        one = left.pop()
        if one not in found:
            found.add(one)
            left += [part for field in one.model_fields.values() for part in parts(field.annotation)]
    return found


def parts(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in parts(part)]


def test_the_five_are_there():
    assert list(DOCUMENTS) == ["recipe", "workload", "evaluation", "rollout", "profile"]


@ALL
def test_every_field_is_described(name):
    found = {model for kind in DOCUMENTS[name].kinds for model in sections(kind)}
    silent = [
        f"{model.__name__}.{field}"
        for model in found
        for field, about in model.model_fields.items()
        if not (about.description or "").strip().endswith(".")
    ]
    assert not silent and all(issubclass(model, UserDocument) for model in found)


@ALL
def test_the_schema_has_the_descriptions(name):
    schema = DOCUMENTS[name].schema
    jsonschema.Draft202012Validator.check_schema(schema)
    for model in (schema, *schema.get("$defs", {}).values()):
        assert "Example" not in model.get("description", "")
        for field in model.get("properties", {}).values():  # pydantic says once what a field and its section both say
            described = field if "description" in field else schema["$defs"][field["$ref"].rpartition("/")[2]]
            assert described["description"]


@ALL
def test_the_example_is_valid(name):
    document = DOCUMENTS[name]
    read = document.parse(document.example)
    assert read.to_dict() or name in ("workload", "evaluation")  # of which an example is the default
    jsonschema.validate(yaml.safe_load(document.example), document.schema)
    assert document.parse(read.to_yaml()) == read


VALID = [
    ("recipe", "{}"),
    ("recipe", "prune: {method: wanda, pattern: '2:4'}"),
    ("recipe", "prune: {method: movement, penalty: 1.5}\ndistill: {tokens: 1000, text: [builtin, a.txt]}"),
    ("recipe", "calibrate: {text: [{text: 'hf:a/b', config: en, weight: 2}]}"),
    ("recipe", "workload: {recorded: 's3://bucket/traffic/', days: 7}"),
    ("workload", "recorded: s3://bucket/traffic/"),
    ("workload", "input: {histogram: {64: 500, 256: 300}}"),
]


@pytest.mark.parametrize(("name", "text"), VALID)
def test_what_is_parsed_is_valid_by_the_schema(name, text):
    DOCUMENTS[name].parse(text)
    as_json = json.loads(json.dumps(yaml.safe_load(text)))  # whose keys are texts, as those of a histogram
    jsonschema.validate(as_json, DOCUMENTS[name].schema)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe", "quantise: {format: fp8}"),
        ("recipe", "quantize: {format: fp9}"),
        ("recipe", "prune: {method: depth, blocks: 0}"),
        ("workload", "concurrency: 0"),
        ("evaluation", "items: [1, 2]"),
        ("rollout", "service: a"),
        ("profile", "gpu: {tolerations: [{effect: Never}]}"),
    ],
)
def test_what_is_refused_is_not_valid_by_the_schema(name, text):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), DOCUMENTS[name].schema)


@ALL
def test_the_command(name, tmp_path, capsys):
    assert main.main([name, "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == DOCUMENTS[name].schema
    assert main.main([name, "--example"]) == 0
    path = tmp_path / "example.yaml"
    path.write_text(capsys.readouterr().out)
    assert main.main([name, "--check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path} is a valid {name}\n"


def test_a_document_that_is_none(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("quantize: {fromat: fp8}")
    assert main.main(["recipe", "--check", str(path)]) == 2
    assert "quantize.fromat: unknown key 'fromat'; write 'format'" in " ".join(capsys.readouterr().err.split())
    assert main.main(["recipe", "--check", str(tmp_path / "none.yaml")]) == 2
    assert "cannot be read" in " ".join(capsys.readouterr().err.split())


def test_one_thing_is_asked_of_a_document(capsys):
    assert main.main(["recipe"]) == 2
    assert "--schema --example --check" in " ".join(capsys.readouterr().err.split())
