"""Ways to an S3 endpoint from a pod: passing keys, a role in place of keys, a proxy, a site's own authority."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from json_server import JsonServer

from trimtab.base.errors import InputError, StoreError
from trimtab.store import open_store
from trimtab.store.s3 import S3Back

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


class Bucket(JsonServer):
    """Answers every read with the token that the request was signed with; over TLS where it has a certificate."""

    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__()
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
            self.host = self.host.replace("http://", "https://")

    def answer(self, method: str, path: str, query: Any, body: Any, headers: Any) -> tuple[int, Any]:
        return 200, headers.get("X-Amz-Security-Token", "no token")


@pytest.fixture
def keys(monkeypatch):
    """The environment of a pod with keys, and no word of where."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "a-key")
    for name in ("AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "SSL_CERT_FILE", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("token", ["", "of-an-hour"])
def test_keys_that_pass_go_with_their_token(token, keys, monkeypatch):
    server = Bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.host)
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    assert S3Back("bucket", "").read("key").decode() == (token or "no token")
    server.close()


@pytest.mark.parametrize("variable", ["AWS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_sites_own_authority(variable, keys, monkeypatch, tmp_path):
    """As `authority` of a profile mounts it."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "the site")])
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(1))
    signed = certificate.add_extension(here, critical=False).sign(key, hashes.SHA256())
    encoding = serialization.Encoding.PEM
    own = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "ca.crt").write_bytes(signed.public_bytes(encoding))
    (tmp_path / "server.pem").write_bytes(own + signed.public_bytes(encoding))
    server = Bucket(tmp_path / "server.pem")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.host)
    with pytest.raises(StoreError, match="its TLS certificate is not trusted: set SSL_CERT_FILE"):
        S3Back("bucket", "").read("key")
    monkeypatch.setenv(variable, str(tmp_path / "ca.crt"))
    assert S3Back("bucket", "").read("key") == b"no token"
    server.close()


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
