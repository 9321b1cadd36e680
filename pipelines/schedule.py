"""Recurring runs on a server: one at a time, and none made up for when the scheduler was away."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trimtab.errors import InputError, nearest
from trimtab.pipelines.connection import Connection
from trimtab.pipelines.cron import Cron
from trimtab.pipelines.upload import Uploaded, experiment_id

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
        InputError: a schedule of this name exists.
    """
    if any(item.display_name == name for item in schedules(connection)):
        raise InputError(f"name: a schedule '{name}' exists; write trimtab unschedule {name} first, or another --name")
    return connection.change(
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
    """Deletes the recurring run of that name or id; runs that it started go on.

    Raises:
        InputError: there is none; names the nearest.
    """
    known = list(schedules(connection))
    for item in known:
        if name in (item.recurring_run_id, item.display_name):
            delete = connection.client.delete_recurring_run
            connection.change(f"delete schedule '{name}'", delete, item.recurring_run_id)
            return
    names = [item.display_name for item in known]
    raise InputError(f"schedule: there is no '{name}'; {nearest(name, names) if names else 'there is none at all'}")
