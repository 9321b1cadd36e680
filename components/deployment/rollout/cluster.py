"""A namespace's InferenceServices and its approvals: read, changed by the server, and what its refusals mean."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kubernetes import client, config
from urllib3 import exceptions as network

from trimtab.base.errors import InputError, StageError, TrimtabError
from trimtab.components.deployment.rollout.settings import GROUP, PLURAL, VERSION

MANAGER = "trimtab"
TIMEOUT = 30
PATIENCE, LONGEST_PAUSE = 60.0, 10.0
PASSING = (429, 500, 502, 503, 504)
APPLY, MERGE = "application/apply-patch+yaml", "application/merge-patch+json"


class Cluster:
    """A namespace's InferenceServices and ConfigMaps, through a client of the Kubernetes API."""

    def __init__(self, api: client.ApiClient, namespace: str, patience: float = PATIENCE):
        self._api, self.namespace, self._patience = api, namespace, patience

    @classmethod
    def connect(cls, namespace: str, context: str = "") -> Cluster:
        """Connects as kubectl does, or as a pod's service account.

        Raises:
            InputError: there is neither a kubeconfig nor a service account, or no such context in it.
        """
        configuration = client.Configuration()
        try:
            if context:
                raise config.ConfigException
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            try:
                config.load_kube_config(context=context or None, client_configuration=configuration)
            except config.ConfigException as error:
                said = " ".join(str(error).split())
                raise InputError(
                    f"context: no cluster is configured ({said}); write a kubeconfig, or --context"
                ) from None
        return cls(client.ApiClient(configuration), namespace)

    def read(self, name: str) -> dict[str, Any] | None:
        """Returns the service, None when there is none of this name."""
        return self._read(_service(name))

    def apply(self, service: dict[str, Any], force: bool = False, dry: bool = False) -> dict[str, Any]:
        """Applies what trimtab says of the service and leaves what others say; returns what it is then.

        Raises:
            InputError: a field belongs to someone else and `force` is off, or it is not allowed.
        """
        thing = _service(service["metadata"]["name"])
        query = [("fieldManager", MANAGER), ("force", "true" if force else "false"), *_dry(dry)]
        return self._call("apply", thing, lambda: self._request("PATCH", thing, query, service, APPLY))

    def delete(self, name: str) -> None:
        """Deletes the service."""
        thing = _service(name)
        self._call("delete", thing, lambda: self._request("DELETE", thing))

    def read_config(self, name: str) -> dict[str, Any] | None:
        """Returns the ConfigMap, None when there is none of this name."""
        return self._read(_config(name))

    def change_config(self, name: str, data: dict[str, str], version: str = "", dry: bool = False) -> bool:
        """Sets entries of a ConfigMap and leaves its others.

        Args:
            version: the resourceVersion that it must still have; "" for any.
            dry: only asks whether it could be done.

        Returns:
            False when it has changed since `version`, and nothing was set.

        Raises:
            InputError: there is no such ConfigMap, or it may not be changed.
            StageError: others change it all the time.
        """
        thing = _config(name)
        body = {"metadata": {"resourceVersion": version} if version else {}, "data": data}
        query = [("fieldManager", MANAGER), *_dry(dry)]
        try:
            self._call("change", thing, lambda: self._request("PATCH", thing, query, body, MERGE))
        except _Conflict:
            if version:
                return False
            raise StageError(f"ConfigMap '{name}' changes all the time; run the command again") from None
        return True

    def _read(self, thing: _Thing) -> dict[str, Any] | None:
        try:
            return self._call("read", thing, lambda: self._request("GET", thing))
        except _Absent:
            return None

    def _request(self, method: str, thing: _Thing, query: Any = (), body: Any = None, kind: str = "") -> Any:
        # The generated client cannot send an apply patch to a custom resource, so the path is written here.
        headers = {"Accept": "application/json"}
        if kind:
            headers["Content-Type"] = kind
        answer = self._api.call_api(
            f"{thing.root}/namespaces/{self.namespace}/{thing.plural}/{thing.name}",
            method,
            query_params=list(query),
            header_params=headers,
            body=body,
            response_type="object",
            auth_settings=["BearerToken"],
            _request_timeout=TIMEOUT,
        )
        return answer[0]

    def _call(self, verb: str, thing: _Thing, function: Callable[[], Any]) -> Any:
        """Calls, and again while the API is away: to read, apply and delete twice is to do so once."""
        until, pause = time.monotonic() + self._patience, 0.2
        while True:
            try:
                return function()
            except (client.ApiException, network.HTTPError) as error:
                passing = not isinstance(error, client.ApiException) or error.status in PASSING
                if not passing or time.monotonic() + pause > until:
                    raise self._explain(error, verb, thing) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _explain(self, error: Exception, verb: str, thing: _Thing) -> TrimtabError:
        what = f"cannot {verb} {thing.kind} '{thing.name}' in namespace '{self.namespace}'"
        if not isinstance(error, client.ApiException):
            host = self._api.configuration.host
            return StageError(f"{what}: {host} does not answer ({type(error).__name__}); run the command again")
        status = _status(error)
        said = " ".join(str(status.get("message", "")).split())[:300]
        if error.status == 404 and status.get("reason") == "NotFound":
            if (status.get("details") or {}).get("kind") == "namespaces":
                return InputError(f"namespace: {what}: there is no such namespace; create it or write another")
            return _Absent(f"{what}: there is none")
        if error.status == 404:
            return InputError(
                f"{what}: the cluster does not know InferenceServices; install KServe ({GROUP}/{VERSION})"
            )
        if error.status == 401:
            return InputError(f"{what}: the cluster does not know who you are; log in again")
        if error.status == 403:
            return InputError(f"{what}: you may not; apply manifests/release in that namespace ({said})")
        if error.status == 409:
            return _Conflict(f"{what}: someone else owns a field ({said}); write --force to take it over")
        if error.status in (400, 422):
            return InputError(f"{what}: the cluster refuses it ({said}); correct what it names")
        return StageError(f"{what}: the cluster answered {error.status} ({said}); run the command again")


@dataclass(frozen=True)
class _Thing:
    """An object of the namespace: where the API keeps its kind, and what people call it."""

    root: str
    plural: str
    kind: str
    name: str


def _service(name: str) -> _Thing:
    return _Thing(f"/apis/{GROUP}/{VERSION}", PLURAL, "InferenceService", name)


def _config(name: str) -> _Thing:
    return _Thing("/api/v1", "configmaps", "ConfigMap", name)


def _dry(dry: bool) -> list[tuple[str, str]]:
    return [("dryRun", "All")] if dry else []


class _Absent(InputError):
    """There is no such object, though the cluster knows its kind."""


class _Conflict(InputError):
    """The object, or a field of it, is not what whoever changes it takes it for."""


def _status(error: client.ApiException) -> dict[str, Any]:
    """The Status object of an error; {} for a text, which is what a path without a resource answers."""
    try:
        body = json.loads(error.body)
    except (TypeError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}
