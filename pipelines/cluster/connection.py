"""The way to a Kubeflow Pipelines server: where it is, who one is there, and what its refusals mean.

Host, namespace, token and certificate authority come from the flags, else from TRIMTAB_KFP_HOST, TRIMTAB_KFP_NAMESPACE,
TRIMTAB_KFP_TOKEN and TRIMTAB_KFP_CA, else from what `kfp` itself reads (KF_PIPELINES_ENDPOINT, its context file, the
service account of a pod, the kubeconfig).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import kfp
from kfp_server_api import ApiException
from rich.console import Console
from urllib3 import exceptions as network

from trimtab.base.errors import InputError, StageError, TrimtabError

Answer = TypeVar("Answer")

#: What the pipeline needs of a server, by the version that brought it (kubeflow/pipelines #13322 the last).
NEEDS = {
    (2, 15): "optional secrets",
    (2, 16): "lists on the form of a run",
    (2, 17): "the results of pipelines in branches",
}
OLDEST, UNKNOWN = max(NEEDS), (3, 0)
#: Seconds for which a lost connection is tried again, and the longest pause between two tries.
PATIENCE, LONGEST_PAUSE = 60.0, 15.0
TIMEOUT = 30
#: Statuses of a server, or of a proxy before it, that will be well again.
PASSING = (0, 429, 500, 502, 503, 504)


class _Client(kfp.Client):
    """kfp's client, without its own five silent tries of five seconds when the server refuses the first call."""

    def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
        ask = self._healthz_api.healthz_service_get_healthz_with_http_info
        health, _, headers = ask(_request_timeout=TIMEOUT)
        if "json" not in (headers.get("Content-Type") or ""):
            # A proxy led to its login page, of which kfp's client makes an empty answer, and so of all that follow.
            raise ApiException(status=303, reason="a page")
        return health

    def version(self) -> str:
        """Returns the server's version, which only the older API tells; "" where it does not."""
        try:
            answer = self._healthz_api.api_client.call_api(
                "/apis/v1beta1/healthz",
                "GET",
                response_type="object",
                auth_settings=["Bearer"],
                _request_timeout=TIMEOUT,
            )
        except ApiException:
            return ""
        return str((answer[0] or {}).get("tag_name") or "")


@dataclass
class Connection:
    """A server that has answered. `namespace` is the user's, "" on a server for a single user."""

    client: kfp.Client
    namespace: str
    console: Console
    patience: float = PATIENCE

    @property
    def host(self) -> str:
        return self.client._existing_config.host

    def read(self, what: str, function: Callable[..., Answer], *arguments: Any, **options: Any) -> Answer:
        """Calls what changes nothing on the server; tries again while the connection is lost."""
        return self._call(what, function, arguments, options, repeatable=True)

    def change(self, what: str, function: Callable[..., Answer], *arguments: Any, **options: Any) -> Answer:
        """Calls what must not happen twice; tries again only when the server was not reached at all."""
        return self._call(what, function, arguments, options, repeatable=False)

    def _call(self, what: str, function: Callable[..., Any], arguments: Any, options: Any, repeatable: bool) -> Any:
        until, pause = time.monotonic() + self.patience, 0.5
        while True:
            try:
                with _quiet():
                    return function(*arguments, **options)
            except (ApiException, network.HTTPError, OSError) as error:
                if not _passes(error, repeatable) or time.monotonic() + pause > until:
                    raise explain(error, what, self.host, self.namespace) from None
                self.console.print(f"[dim]{self.host} does not answer; trying again[/dim]", highlight=False)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def connect(
    console: Console, host: str = "", namespace: str = "", token: str = "", ca: str = "", patience: float = PATIENCE
) -> Connection:
    """Finds the server and asks for its health.

    Raises:
        InputError: a bad address or credential, no namespace where there are many, or a server too old or too new.
        StageError: the server does not answer.
    """
    host = host or os.environ.get("TRIMTAB_KFP_HOST", "")
    namespace = namespace or os.environ.get("TRIMTAB_KFP_NAMESPACE", "")
    token = token or os.environ.get("TRIMTAB_KFP_TOKEN", "")
    ca = ca or os.environ.get("TRIMTAB_KFP_CA", "")
    if host and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", host):
        raise InputError(f"host: '{host}' is not valid; write https://host[:port][/path]")
    if ca and not Path(ca).is_file():
        raise InputError(f"ca: '{ca}' is not a file; write the path of a PEM file")
    shown = host or os.environ.get("KF_PIPELINES_ENDPOINT", "") or "the server of kfp's own configuration"
    try:
        with _quiet():
            client = _Client(host=host or None, existing_token=token or None, ssl_ca_cert=ca or None)
            health = client.get_kfp_healthz()
            version = client.version()
    except (ApiException, network.HTTPError, OSError) as error:
        raise explain(error, "ask for its health", shown, namespace) from None
    _check_version(version, shown, console)
    namespace = namespace or client.get_user_namespace()
    if health.multi_user and not namespace:
        raise InputError(f"namespace: {shown} has a namespace for each user; write --namespace NAME")
    return Connection(client, namespace if health.multi_user else "", console, patience)


def _check_version(version: str, host: str, console: Console) -> None:
    """Refuses a server that lacks what the pipeline needs, before it is asked for a GPU."""
    needed = ".".join(map(str, OLDEST)) + ".0"
    found = re.match(r"v?(\d+)\.(\d+)", version)
    if not found:
        said = f"{host} does not say which version it is; the pipeline needs {needed} or later"
        console.print(said, style="dim", highlight=False, markup=False)
        return
    number = tuple(map(int, found.groups()))
    if number >= UNKNOWN:
        raise InputError(
            f"host: {host} runs Kubeflow Pipelines {version}, whose API trimtab does not know; write a server of "
            f"{needed} to {OLDEST[0]}.x"
        )
    lacking = [f"{what} ({'.'.join(map(str, since))})" for since, what in NEEDS.items() if number < since]
    if lacking:
        raise InputError(
            f"host: {host} runs Kubeflow Pipelines {version}, which cannot run this pipeline: it lacks "
            f"{', '.join(lacking)}; upgrade it to {needed} or later"
        )


def explain(error: Exception, what: str, host: str, namespace: str) -> TrimtabError:
    """Returns the error for a refused or lost call, as one sentence that says what to do; never quotes a token."""
    where = f"cannot {what} at {host}"
    if isinstance(error, ApiException) and error.status:
        return _explain_status(error.status, _message(error), where, namespace)
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, network.NameResolutionError):
        return StageError(f"{where}: its host name is not known; correct --host")
    if isinstance(reason, network.NewConnectionError):
        return StageError(f"{where}: it refuses the connection; correct --host, or forward a port to ml-pipeline-ui")
    if isinstance(reason, network.SSLError) or "SSL" in str(reason)[:60]:
        return StageError(f"{where}: its TLS certificate is not trusted; write --ca FILE, or http:// if it has no TLS")
    if isinstance(reason, network.TimeoutError):
        return StageError(f"{where}: it does not answer in time; run the command again")
    return StageError(f"{where}: the connection broke ({type(reason).__name__}); run the command again")


def _explain_status(status: int, message: str, where: str, namespace: str) -> TrimtabError:
    said = f" (it says: {message})" if message else ""
    if status == 401:
        return InputError(f"token: {where}: it does not know who you are; write --token, or get a fresh one{said}")
    if status == 403:
        remedy = f"get the role kubeflow-edit in namespace '{namespace}'" if namespace else "get a token that may"
        return InputError(f"namespace: {where}: you may not; {remedy}, or write another --namespace{said}")
    if status == 404:
        return InputError(f"{where}: there is no such thing; correct the name, or --host{said}")
    if status == 409:
        return InputError(f"{where}: something of that name exists already{said}")
    if status in (301, 302, 303, 307, 308):
        return InputError(f"token: {where}: it answers with a page, such as a login; write --token, or correct --host")
    if status in PASSING:
        return StageError(f"{where}: it answered {status}{said}; run the command again")
    return InputError(f"{where}: it answered {status}{said}; correct what it names")


def _message(error: ApiException) -> str:
    """What the server says about an error, in one line of at most 200 characters."""
    try:
        body = json.loads(error.body)
        text = body.get("message") or body.get("error_message") or body.get("error") or ""
    except (TypeError, ValueError, AttributeError):
        return ""
    text = " ".join(str(text).split())
    return text if len(text) <= 200 else f"{text[:200]} …"


def _passes(error: Exception, repeatable: bool) -> bool:
    """Whether trying again may help, and can do no harm."""
    if isinstance(error, ApiException):
        return repeatable and (error.status or 0) in PASSING and "SSL" not in str(error.reason)
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, network.SSLError | network.NameResolutionError):
        return False
    return repeatable or isinstance(reason, network.NewConnectionError)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """kfp's client prints links and warns of its own version; trimtab says what there is to say."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
