"""Each room's README says what its component says, and its metadata.yaml is as kubeflow/pipelines-components asks."""

import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import rooms
import yaml
from kfp import dsl

from trimtab.errors import InputError

VALID = {
    "name": "room",
    "stability": "beta",
    "dependencies": {"kubeflow": [{"name": "Pipelines", "version": ">=2.17.0"}]},
    "tags": ["quantization"],
    "lastVerified": datetime(2026, 11, 24, tzinfo=UTC),
    "links": {"documentation": "https://example.org"},
}
METADATA = rooms.Metadata.model_validate(VALID)
INTERFACE = """## `face`

Returns two things.

| input | type | default | meaning |
|---|---|---|---|
| `first` | String | required | Why &#124; not. |
| `second` | Integer | `3` | A number. |

| output | type | meaning |
|---|---|---|
| `one` | String | The first, at length. |
| `two` | Integer | The second. |

Stability: beta, Pipelines >=2.17.0. Last verified 2026-11-24."""
PIPELINES = {"kubeflow": [{"name": "Pipelines", "version": "2.17.0"}]}
#: What differs from VALID, and what the message says.
INVALID = [
    ({"name": None}, "name: is empty; write a value"),
    ({"name": "chamber"}, "name: 'chamber' is not the folder's; write room"),
    ({"stability": "betta"}, "stability: 'betta' is not valid; write 'beta'"),
    ({"tier": "core"}, "unknown key 'tier'"),
    ({"dependencies": {}}, "dependencies.kubeflow: is required"),
    ({"dependencies": {"kubeflow": [{"name": "Trainer", "version": "2.0.0"}]}}, "must hold a version of Pipelines"),
    ({"dependencies": {"kubeflow": [{"name": "Pipelines", "version": ">=2.17"}]}}, "version: '>=2.17'"),
    ({"dependencies": {**PIPELINES, "external_services": [{"name": "KServe"}]}}, "version: is required"),
    ({"tags": "quantization"}, "tags: 'quantization' is not a list; write [quantization]"),
    ({"tags": [1]}, "tags.0: 1 is not how YAML reads a text without quotes"),
    ({"lastVerified": "2026-11-24T00:00:00"}, "lastVerified"),
    ({"lastVerified": datetime(2025, 11, 20, tzinfo=UTC)}, "lastVerified: 2025-11-20 is no day of the last year"),
    ({"lastVerified": datetime(2026, 11, 30, tzinfo=UTC)}, "lastVerified: 2026-11-30 is no day of the last year"),
    ({"ci": {"skip_dependency_probe": "no"}}, "ci.skip_dependency_probe: 'no' should be a valid boolean"),
    ({"links": ["https://example.org"]}, "links"),
]
NOW = datetime(2026, 11, 28, tzinfo=UTC)


def write(folder: Path, metadata: dict) -> Path:
    room = folder / "room"
    room.mkdir(exist_ok=True)
    (room / "metadata.yaml").write_text(yaml.safe_dump(metadata, sort_keys=False))
    return room


@pytest.mark.parametrize("room", rooms.rooms(), ids=lambda room: room.name)
def test_a_readme_is_what_make_docs_would_write(room):
    text = (room / "README.md").read_text()
    verified = yaml.safe_load((room / "metadata.yaml").read_text())["lastVerified"]
    metadata = rooms.Metadata.read(room, now=verified)  # `make docs` asks for the year; an old checkout still passes
    assert rooms.renewed(text, rooms.interface(metadata, rooms.rooms()[room])) == text, "stale: run make docs"


def test_every_room_is_told_of():
    faces = {path.parent.name for path in rooms.ROOT.glob("components/*/__init__.py")}
    assert {room.name for room in rooms.rooms()} == faces | {"pipelines"}
    assert all(rooms.rooms().values())


@dsl.component(base_image="registry/image:1")
def face(first: str, second: int = 3) -> NamedTuple("Out", one=str, two=int):
    """Returns two things.

    Args:
        first: Why | not.

    Returns:
        one: The first,
            at length.
        two: The second.
    """


def test_what_a_docstring_says_is_in_the_tables():
    with pytest.raises(InputError, match="the docstring of face does not describe `second`"):
        rooms.interface(METADATA, [face])
    face.python_func.__doc__ = face.python_func.__doc__.replace("not.", "not.\n        second: A number.")
    assert rooms.interface(METADATA, [face]) == INTERFACE


def test_metadata_is_read(tmp_path):
    read = rooms.Metadata.read(write(tmp_path, VALID), NOW)
    assert (read.stability, read.tags, read.dependencies.kubeflow[0].version) == ("beta", ("quantization",), ">=2.17.0")


@pytest.mark.parametrize(("change", "message"), INVALID, ids=lambda value: str(value)[:50])
def test_metadata_of_another_shape_is_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        rooms.Metadata.read(write(tmp_path, {**VALID, **change}), NOW)
    assert str(refused.value).startswith("metadata.yaml: ")


@pytest.mark.parametrize("field", ("name", "stability", "dependencies", "lastVerified"))
def test_required_fields_stand_in_their_order(tmp_path, field):
    without = {key: value for key, value in VALID.items() if key != field}
    with pytest.raises(InputError, match=f"{field}: is required"):
        rooms.Metadata.read(write(tmp_path, without), NOW)
    if field != "lastVerified":  # which is the last in any case
        with pytest.raises(InputError, match="another order than name, stability, dependencies, lastVerified"):
            rooms.Metadata.read(write(tmp_path, {**without, field: VALID[field]}), NOW)


@pytest.fixture
def house(tmp_path, monkeypatch) -> Path:
    """A copy of the rooms' faces, verified an hour ago, with READMEs that say so."""
    for room in rooms.rooms():
        copy = tmp_path / room.relative_to(rooms.ROOT)
        copy.mkdir(parents=True)
        for path in (*room.glob("README.md"), *room.glob("metadata.yaml"), *room.glob("component.py")):
            shutil.copy(path, copy)
        recently = f"lastVerified: {datetime.now(UTC) - timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}"
        text = re.sub("lastVerified: .*", recently, (copy / "metadata.yaml").read_text())
        (copy / "metadata.yaml").write_text(text)
    monkeypatch.setattr(rooms, "ROOT", tmp_path)
    assert rooms.main([]) == 0 and rooms.main(["--check"]) == 0
    return tmp_path


def test_a_stale_readme_is_named_and_made_anew(house, capsys):
    metadata, readme = (house / "components/pruning" / name for name in ("metadata.yaml", "README.md"))
    metadata.write_text(metadata.read_text().replace("alpha", "stable"))
    readme.write_text(readme.read_text().replace("# Pruning", "# Pruning, by hand") + "\nAdded by hand.\n")
    before = readme.read_text()
    assert rooms.main(["--check"]) == 1
    assert capsys.readouterr().err == "components/pruning/README.md is stale: run make docs\n"
    assert readme.read_text() == before
    assert rooms.main([]) == 0
    assert readme.read_text() == before.replace("Stability: alpha", "Stability: stable") != before


def test_what_cannot_be_written_leaves_the_other_readmes_alone(house, capsys):
    readme = house / "components/fetch/README.md"
    readme.write_text("# Fetch\n")
    metadata = house / "components/engine/metadata.yaml"
    metadata.write_text(metadata.read_text().replace("alpha", "gamma"))
    assert rooms.main([]) == 1
    said = capsys.readouterr().err
    assert "components/fetch: README.md lacks the two marks" in said and rooms.BEGIN in said
    assert "components/engine: metadata.yaml: stability: 'gamma' is not valid" in said
    assert readme.read_text() == "# Fetch\n"
