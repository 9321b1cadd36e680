"""InferenceServices of a cluster: read, applied by the server, and what its refusals mean."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from kubernetes import client, config
from urllib3 import exceptions as network

from trimtab.components.deployment.serving import GROUP, PLURAL, VERSION
from trimtab.errors import InputError, StageError, TrimtabError

MANAGER = "trimtab"
TIMEOUT = 30
PATIENCE, LONGEST_PAUSE = 60.0, 10.0
PASSING = (429, 500, 502, 503, 504)


class Cluster:
    """A namespace's InferenceServices, through a client of the Kubernetes API."""

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
        try:
            return self._call("read", name, lambda: self._request("GET", name))
        except _Absent:
            return None

    def apply(self, service: dict[str, Any], force: bool = False, dry: bool = False) -> dict[str, Any]:
        """Applies what trimtab says of the service and leaves what others say; returns what it is then.

        Raises:
            InputError: a field belongs to someone else and `force` is off, or it is not allowed.
        """
        name = service["metadata"]["name"]
        query = [("fieldManager", MANAGER), ("force", "true" if force else "false")]
        if dry:
            query.append(("dryRun", "All"))
        return self._call("apply", name, lambda: self._request("PATCH", name, query, service))

    def delete(self, name: str) -> None:
        """Deletes the service."""
        self._call("delete", name, lambda: self._request("DELETE", name))

    def _request(self, method: str, name: str, query: Any = (), body: Any = None) -> Any:
        # The generated client cannot send an apply patch to a custom resource, so the path is written here.
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{self.namespace}/{PLURAL}/{name}"
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/apply-patch+yaml"
        answer = self._api.call_api(
            path,
            method,
            query_params=list(query),
            header_params=headers,
            body=body,
            response_type="object",
            auth_settings=["BearerToken"],
            _request_timeout=TIMEOUT,
        )
        return answer[0]

    def _call(self, verb: str, name: str, function: Callable[[], Any]) -> Any:
        """Calls, and again while the API is away: to read, apply and delete twice is to do so once."""
        until, pause = time.monotonic() + self._patience, 0.2
        while True:
            try:
                return function()
            except (client.ApiException, network.HTTPError) as error:
                passing = not isinstance(error, client.ApiException) or error.status in PASSING
                if not passing or time.monotonic() + pause > until:
                    raise self._explain(error, verb, name) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _explain(self, error: Exception, verb: str, name: str) -> TrimtabError:
        what = f"cannot {verb} InferenceService '{name}' in namespace '{self.namespace}'"
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
            return InputError(f"{what}: someone else owns a field ({said}); write --force to take it over")
        if error.status in (400, 422):
            return InputError(f"{what}: the cluster refuses it ({said}); correct what it names")
        return StageError(f"{what}: the cluster answered {error.status} ({said}); run the command again")


class _Absent(InputError):
    """There is no such object, though the cluster knows its kind."""


def _status(error: client.ApiException) -> dict[str, Any]:
    """The Status object of an error; {} for a text, which is what a path without a resource answers."""
    try:
        body = json.loads(error.body)
    except (TypeError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}
