"""Brings the pipeline to a server, and starts a run of it. A version is named after its digest, so it is there once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfp_server_api import V2beta1Pipeline

from trimtab.base.errors import InputError
from trimtab.pipelines.cluster.connection import Connection
from trimtab.pipelines.package import PIPELINES, server_name, version_name


@dataclass(frozen=True)
class Uploaded:
    """A version of the pipeline on the server; `new` when this call brought it."""

    pipeline: str
    version: str
    name: str
    new: bool


def upload(connection: Connection, package: Path, kind: str) -> Uploaded:
    """Uploads the compiled pipeline, one of PIPELINES, unless the server has this very one.

    Two uploads at once end in one version.
    """
    name = version_name(package, kind)
    pipeline = _found(_pipelines(connection, kind)) or _created(connection, kind)
    version = _found(_versions(connection, pipeline.pipeline_id, name))
    if version:
        return Uploaded(pipeline.pipeline_id, version.pipeline_version_id, name, new=False)
    version = _once(
        lambda: connection.change(
            "upload the pipeline",
            connection.client.upload_pipeline_version,
            str(package),
            pipeline_version_name=name,
            pipeline_id=pipeline.pipeline_id,
        ),
        lambda: _found(_versions(connection, pipeline.pipeline_id, name)),
    )
    return Uploaded(pipeline.pipeline_id, version.pipeline_version_id, name, new=True)


def start(
    connection: Connection,
    uploaded: Uploaded,
    arguments: dict[str, Any],
    *,
    name: str,
    experiment: str,
    service_account: str = "",
) -> str:
    """Starts a run and returns its id. KFP's caching stays as compiled: off (the store's index is the cache)."""
    return connection.change(
        "start a run",
        connection.client.run_pipeline,
        experiment_id=experiment_id(connection, experiment),
        job_name=name,
        params=arguments,
        pipeline_id=uploaded.pipeline,
        version_id=uploaded.version,
        service_account=service_account or None,
    ).run_id


def experiment_id(connection: Connection, name: str) -> str:
    """Returns the experiment of that name; makes it when there is none."""
    create = connection.client.create_experiment
    return connection.read(f"open experiment '{name}'", create, name, namespace=connection.namespace).experiment_id


def _pipelines(connection: Connection, kind: str) -> Any:
    answer = connection.read(
        "list pipelines",
        connection.client.list_pipelines,
        namespace=connection.namespace or None,
        filter=named(server_name(kind)),
    )
    return answer.pipelines


def _created(connection: Connection, kind: str) -> Any:
    wanted = V2beta1Pipeline(
        display_name=server_name(kind),
        namespace=connection.namespace or None,
        description=PIPELINES[kind],
    )
    create = connection.client.pipelines.pipeline_service_create_pipeline
    return _once(
        lambda: connection.change("create the pipeline", create, pipeline=wanted),
        lambda: _found(_pipelines(connection, kind)),
    )


def _versions(connection: Connection, pipeline: str, name: str) -> Any:
    answer = connection.read("list versions", connection.client.list_pipeline_versions, pipeline, filter=named(name))
    return answer.pipeline_versions


def _once(create: Callable[[], Any], find: Callable[[], Any]) -> Any:
    """Creates; where another was quicker, finds what it made."""
    try:
        return create()
    except InputError:
        found = find()
        if found is None:
            raise
        return found


def _found(items: Any) -> Any:
    return items[0] if items else None


def named(name: str) -> str:
    """A filter of KFP's list calls: the display name is exactly this."""
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [predicate]})
