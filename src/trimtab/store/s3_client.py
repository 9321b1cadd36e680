"""The connection to an S3 endpoint, made from the environment.

By the minio client: obstore has conditional writes of its own and resumes downloads, but its errors carry neither S3's
code nor the cause of a failed connection except in the text of Rust's debug output, and messages here are made of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment

from trimtab.base.errors import InputError

AWS = "https://s3.amazonaws.com"

#: Seconds to open a connection. It is tried three times, so a silent host fails in less than ten.
CONNECT_TIMEOUT = 2.5


@dataclass(frozen=True)
class Connection:
    """A minio client, the urllib3 pool below it, and the values that must not appear in a message."""

    endpoint: str
    client: Any
    http: Any
    secrets: tuple[str, ...] = field(repr=False)


def connect(environment: Mapping[str, str], read_timeout: float, retries: int) -> Connection:
    """Returns a connection; sends nothing yet.

    Args:
        environment: AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION
            (or AWS_DEFAULT_REGION), and SSL_CERT_FILE or AWS_CA_BUNDLE for a private authority. In place of the keys
            AWS_WEB_IDENTITY_TOKEN_FILE and AWS_ROLE_ARN, as a service account of Kubernetes gets them. HTTPS_PROXY,
            HTTP_PROXY and NO_PROXY are heeded.
        read_timeout: seconds without a byte from the server before a request fails.
        retries: how often a request that failed is sent again.

    Raises:
        InputError: the endpoint is not an address, or the credentials are not set.
    """
    import certifi
    import minio
    import urllib3

    endpoint = environment.get("AWS_ENDPOINT_URL") or AWS
    host, secure = _host(endpoint)
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    key, secret, token = (environment.get(name) or None for name in names)
    identity = environment.get("AWS_WEB_IDENTITY_TOKEN_FILE"), environment.get("AWS_ROLE_ARN")
    if not (key and secret) and not all(identity):
        raise InputError(
            "the store is in S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to its keys, or give the pods a "
            "service account with a role (AWS_ROLE_ARN and AWS_WEB_IDENTITY_TOKEN_FILE)"
        )
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if not region and not host.endswith("amazonaws.com"):
        # Saves a request for the bucket's region, which other servers do not have or do not allow.
        region = "us-east-1"
    authorities = environment.get("AWS_CA_BUNDLE") or environment.get("SSL_CERT_FILE") or certifi.where()
    proxy = _proxy(endpoint, host, environment)
    pool = partial(urllib3.ProxyManager, proxy) if proxy else urllib3.PoolManager
    http = pool(
        timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT, read=read_timeout),
        retries=urllib3.Retry(
            total=retries,
            connect=2,
            backoff_factor=0.2,
            status_forcelist=(500, 502, 503, 504),
            raise_on_status=False,
        ),
        maxsize=64,
        cert_reqs="CERT_REQUIRED",
        ca_certs=authorities,
    )
    options = {"secure": secure, "region": region, "http_client": http}
    if not (key and secret):
        options["credentials"] = role(environment, http)
    try:
        client = minio.Minio(host, key, secret, token, **options)
    except ValueError:
        raise InputError("AWS_ENDPOINT_URL is not an address: write http(s)://host:port") from None
    return Connection(endpoint, client, http, tuple(value for value in (secret, token, key) if value))


def role(environment: Mapping[str, str], http: Any) -> Any:
    """Returns a provider of credentials for a role, which the identity of a service account stands for.

    Source: AssumeRoleWithWebIdentity, AWS Security Token Service API reference; AWS_ENDPOINT_URL_STS is where another
    server has it.
    """
    from minio.credentials import Provider, WebIdentityProvider

    class Role(Provider):
        """Asks for new credentials when the old ones are about to expire; Kubernetes renews the file."""

        def __init__(self) -> None:
            self._provider = WebIdentityProvider(
                jwt_provider_func=self._identity,
                sts_endpoint=environment.get("AWS_ENDPOINT_URL_STS") or _sts(environment.get("AWS_REGION")),
                role_arn=environment["AWS_ROLE_ARN"],
                role_session_name=environment.get("AWS_ROLE_SESSION_NAME") or "trimtab",
                http_client=http,
            )

        def _identity(self) -> dict[str, str]:
            path = environment["AWS_WEB_IDENTITY_TOKEN_FILE"]
            try:
                return {"access_token": Path(path).read_text(encoding="utf-8").strip(), "expires_in": "0"}
            except OSError as error:
                raise InputError(f"AWS_WEB_IDENTITY_TOKEN_FILE: '{path}' cannot be read ({error.strerror})") from None

        def retrieve(self) -> Any:
            try:
                return self._provider.retrieve()
            except ValueError as error:
                status = str(error).rpartition("HTTP status code ")[2][:3]
                raise InputError(
                    f"AWS_ROLE_ARN: the identity of this service account does not get the role "
                    f"{environment['AWS_ROLE_ARN']} (status {status}); correct the role, or whom it trusts"
                ) from None

    return Role()


def _sts(region: str | None) -> str:
    if not region:
        return "https://sts.amazonaws.com"
    return f"https://sts.{region}.amazonaws.com" + (".cn" if region.startswith("cn-") else "")


def _proxy(endpoint: str, host: str, environment: Mapping[str, str]) -> str | None:
    """The proxy that stands before an endpoint, by the variables that curl and Python's own urllib heed."""
    scheme = urlsplit(endpoint).scheme
    named = {name.lower(): value for name, value in environment.items()}
    proxy = named.get(f"{scheme}_proxy") or named.get("all_proxy")
    return proxy if proxy and not proxy_bypass_environment(host, {"no": named.get("no_proxy", "")}) else None


def _host(endpoint: str) -> tuple[str, bool]:
    """Returns host[:port] and whether the endpoint is https."""
    remedy = "write http(s)://host:port in AWS_ENDPOINT_URL"
    if "@" in endpoint:
        raise InputError(f"AWS_ENDPOINT_URL holds credentials: {remedy}, and the keys in AWS_ACCESS_KEY_ID")
    try:
        parts = urlsplit(endpoint)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.path.strip("/") or parts.query:
        raise InputError(f"AWS_ENDPOINT_URL {endpoint!r} is not an address: {remedy}")
    return parts.netloc, parts.scheme == "https"
