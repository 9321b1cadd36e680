"""Schedules on a Kubeflow Pipelines server, and the models that they keep in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trimtab.base.errors import StoreError
from trimtab.store import Store, open_store

from .conftest import RUN


def test_schedules(server, trimtab):
    for name in ("nightly", "weekly", "monthly"):
        assert trimtab("schedule", *RUN, "--cron", "0 3 * * 1", "--name", name)[0] == 0
    assert [pipeline["display_name"] for pipeline in server.kept["pipelines"]] == ["trimtab-rebuild"]
    for item in server.kept["recurringruns"]:
        assert item["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * 1"
        assert (item["no_catchup"], int(item["max_concurrency"])) == (True, 1)
    code, said = trimtab("schedules")
    assert code == 0 and all(name in said for name in ("nightly", "weekly", "monthly")), said  # two a page
    code, said = trimtab("schedule", *RUN, "--cron", "0 3 * * 1", "--name", "weekly")
    assert (code, "a schedule 'weekly' exists; write trimtab unschedule weekly first" in said) == (2, True)
    assert trimtab("unschedule", "monthly")[0] == 0
    assert [item["display_name"] for item in server.kept["recurringruns"]] == ["nightly", "weekly"]
    code, said = trimtab("unschedule", "nightli")
    assert (code, "there is no 'nightli'; write 'nightly'" in said) == (2, True)


def test_a_schedule_of_another_pipeline(server, trimtab):
    assert trimtab("schedule", *RUN, "--cron", "0 3 * * 1", "--pipeline", "optimize")[0] == 0
    assert [pipeline["display_name"] for pipeline in server.kept["pipelines"]] == ["trimtab-optimize"]


@pytest.fixture
def scheduled(tmp_path, server) -> tuple[Store, str, list[str]]:
    """A store, its only tree, and what schedules it as a model."""
    store = open_store(str(tmp_path / "store"))
    model = store.put_json("checkpoint", {}).uri.removeprefix("file://")
    return store, model, ["schedule", "--model", model, "--store", str(tmp_path / "store"), "--cron", "0 3 * * 1"]


def pins(store: Store) -> list[Path]:
    return list(Path(store.uri.removeprefix("file://")).glob("pins/*.json"))


def test_a_schedule_pins_its_model(server, trimtab, scheduled):
    """The model that is a tree of the store is kept for as long as the schedule lasts."""
    store, model, command = scheduled
    for name in ("nightly", "weekly"):
        assert trimtab(*command, "--name", name)[0] == 0
    assert len(pins(store)) == 2 and all(model.rpartition("/")[2] in pin.read_text() for pin in pins(store))
    assert trimtab("unschedule", "nightly")[0] == 0
    (left,) = pins(store)
    assert left.stem == f"schedule-{server.kept['recurringruns'][0]['recurring_run_id']}"


def test_no_schedule_without_its_model(server, trimtab, scheduled, monkeypatch):
    store, model, command = scheduled
    gone = model[:-4] + "0000"
    code, said = trimtab(*[gone if option == model else option for option in command], "--name", "nightly")
    assert (code, "there is no tree" in said, server.kept["recurringruns"]) == (4, True, []), said

    def refuse(*_: Any) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(Store, "pin", refuse)
    code, said = trimtab(*command, "--name", "nightly")
    assert (code, "the disk is full" in said, server.kept["recurringruns"]) == (4, True, []), said
