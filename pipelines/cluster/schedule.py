"""Recurring runs on a server: one at a time, and none made up for when the scheduler was away.

A model that is a tree of the store is pinned for as long as the schedule lasts, or it could be collected between two
runs; a store on a volume that only the cluster sees cannot be told so from here. What the last release consists of is
kept by the release, and a model elsewhere is fetched anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trimtab.base.errors import InputError, TrimtabError, nearest
from trimtab.pipelines.cluster.connection import Connection
from trimtab.pipelines.cluster.cron import Cron
from trimtab.pipelines.cluster.upload import Uploaded, experiment_id
from trimtab.store import Store, open_store
from trimtab.store.address import folder_of, split_tree

PAGE = 100


def schedule(
    connection: Connection,
    uploaded: Uploaded,
    arguments: dict[str, Any],
    *,
    cron: Cron,
    name: str,
    experiment: str,
    service_account: str = "",
) -> str:
    """Creates the recurring run and returns its id. A recurring run cannot be changed, so a name is used once.

    Raises:
        InputError: a schedule of this name exists, or the model's tree cannot be read from here.
        StoreError: the model's tree is not in its store, or could not be pinned; then there is no schedule.
    """
    pinned = _pinned(arguments["model"])
    if pinned:
        pinned.manifest(arguments["model"])
    if any(item.display_name == name for item in schedules(connection)):
        raise InputError(f"name: a schedule '{name}' exists; write trimtab unschedule {name} first, or another --name")
    made = connection.change(
        "create the schedule",
        connection.client.create_recurring_run,
        experiment_id=experiment_id(connection, experiment),
        job_name=name,
        cron_expression=cron.text,
        max_concurrency=1,
        no_catchup=True,
        params=arguments,
        pipeline_id=uploaded.pipeline,
        version_id=uploaded.version,
        service_account=service_account or None,
    ).recurring_run_id
    try:
        if pinned:
            pinned.pin(_pin_name(made), [arguments["model"]])
    except TrimtabError:
        connection.change(f"delete schedule '{name}'", connection.client.delete_recurring_run, made)
        raise
    return made


def schedules(connection: Connection) -> Iterator[Any]:
    """Yields the recurring runs of the namespace, whoever made them."""
    token = ""
    while True:
        page = connection.read(
            "list schedules",
            connection.client.list_recurring_runs,
            page_token=token,
            page_size=PAGE,
            namespace=connection.namespace or None,
        )
        yield from page.recurring_runs or []
        token = page.next_page_token
        if not token:
            return


def unschedule(connection: Connection, name: str) -> None:
    """Deletes the recurring run of that name or id, and its pin; runs that it started go on.

    Raises:
        InputError: there is none; names the nearest. Or its store cannot be opened from here.
        StoreError: the schedule is deleted, and its pin could not be.
    """
    known = list(schedules(connection))
    for item in known:
        if name in (item.recurring_run_id, item.display_name):
            delete = connection.client.delete_recurring_run
            connection.change(f"delete schedule '{name}'", delete, item.recurring_run_id)
            _unpin(item)
            return
    names = [item.display_name for item in known]
    raise InputError(f"schedule: there is no '{name}'; {nearest(name, names) if names else 'there is none at all'}")


def _pinned(model: str) -> Store | None:
    """Returns the store that holds the model as a tree; None for any other model, and for a volume of the cluster."""
    address = (split_tree(model) or ("",))[0]
    seen = address.startswith("s3://") or (address and folder_of(address).is_dir())
    return open_store(address) if seen else None


def _unpin(item: Any) -> None:
    parameters = (item.runtime_config.parameters if item.runtime_config else None) or {}
    try:
        store = _pinned(str(parameters.get("model", "")))
        if store:
            store.unpin(_pin_name(item.recurring_run_id))
    except TrimtabError as error:
        raise type(error)(f"the schedule is ended, but its model stays pinned in the store: {error}") from None


def _pin_name(schedule_id: str) -> str:
    """A name of its own for each schedule of each namespace: servers name them by UUIDs."""
    return f"schedule-{schedule_id}"
