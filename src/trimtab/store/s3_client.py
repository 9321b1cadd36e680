"""The connection to an S3 endpoint, made from the environment.

By the minio client: obstore has conditional writes of its own and resumes downloads, but its errors carry neither S3's
code nor the cause of a failed connection except in the text of Rust's debug output, and messages here are made of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

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
            (or AWS_DEFAULT_REGION), and SSL_CERT_FILE or AWS_CA_BUNDLE for a private authority.
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
    if not key or not secret:
        raise InputError("the store is in S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to its keys")
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if not region and not host.endswith("amazonaws.com"):
        # Saves a request for the bucket's region, which other servers do not have or do not allow.
        region = "us-east-1"
    authorities = environment.get("AWS_CA_BUNDLE") or environment.get("SSL_CERT_FILE") or certifi.where()
    http = urllib3.PoolManager(
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
    try:
        client = minio.Minio(host, key, secret, token, secure=secure, region=region, http_client=http)
    except ValueError:
        raise InputError("AWS_ENDPOINT_URL is not an address: write http(s)://host:port") from None
    return Connection(endpoint, client, http, tuple(value for value in (secret, token, key) if value))


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
