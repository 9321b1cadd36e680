"""Ways to an S3 endpoint from a pod: a role in place of keys, and a proxy."""

from __future__ import annotations

import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from json_server import JsonServer

from trimtab.base.errors import InputError
from trimtab.store import open_store

#: The answer of AWS STS to AssumeRoleWithWebIdentity, of its API reference.
ASSUMED = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials>
<AccessKeyId>{key}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey><SessionToken></SessionToken>
<Expiration>2099-01-01T00:00:00Z</Expiration>
</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""
ROLE = "arn:aws:iam::1:role/trimtab"


class Sts(JsonServer):
    """Gives a role to one identity."""

    def __init__(self, key: str, secret: str):
        self.text, self.asked = ASSUMED.format(key=key, secret=secret), []
        super().__init__()

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any, headers: Any) -> tuple[int, Any]:
        self.asked.append(query | urllib.parse.parse_qs(body if isinstance(body, str) else ""))
        known = self.asked[-1]["WebIdentityToken"] == ["of-the-account"]
        return (200, self.text) if known else (403, "<Error><Code>AccessDenied</Code></Error>")


class Proxy(JsonServer):
    """Sends nothing on; it only knows that it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__()

    def answer(self, method: str, path: str, query: Any, body: Any, headers: Any) -> tuple[int, Any]:
        self.asked.append(headers["Host"])
        return 503, "<Error><Code>ServiceUnavailable</Code></Error>"


@pytest.fixture
def role(s3_server, monkeypatch, tmp_path):
    """The environment of a pod whose service account has a role, and its server of tokens."""
    server = Sts(s3_server.key, s3_server.secret)
    (tmp_path / "token").write_text("of-the-account\n")
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.host)
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    yield server
    server.close()


def test_a_role_in_place_of_keys(role, s3_server):
    """As a service account of Kubernetes has it; also for what is written by a signed address."""
    store = open_store(f"s3://{s3_server.bucket}/role")
    store.check()
    assert store.release("tiny", {"made": "by a role"}).endswith("/releases/tiny/000001")
    assert role.asked[0]["RoleArn"] == [ROLE] and len(role.asked) == 2, "once a connection, and `check` has its own"


def test_a_role_that_is_refused(role, s3_server, tmp_path):
    (tmp_path / "token").write_text("of-another")
    with pytest.raises(InputError, match=f"AWS_ROLE_ARN: .* does not get the role {ROLE} .status 403.; correct"):
        open_store(f"s3://{s3_server.bucket}/role").check()
    Path(tmp_path / "token").unlink()
    with pytest.raises(InputError, match="AWS_WEB_IDENTITY_TOKEN_FILE: .* cannot be read"):
        open_store(f"s3://{s3_server.bucket}/role").check()


def test_a_proxy_is_asked_unless_the_host_is_excepted(s3_server, monkeypatch):
    proxy = Proxy()
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HTTP_PROXY", proxy.host)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,.svc.cluster.local")
    open_store(f"s3://{s3_server.bucket}/proxy").check()
    assert proxy.asked == []
    monkeypatch.setenv("NO_PROXY", ".svc.cluster.local")
    with pytest.raises(InputError):
        open_store(f"s3://{s3_server.bucket}/proxy").check()
    assert proxy.asked and set(proxy.asked) == {s3_server.endpoint.removeprefix("http://")}
    proxy.close()
