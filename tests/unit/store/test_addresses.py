"""The store: where it is, whether it can be used, and what a server may do wrong."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from pathlib import Path

import pytest
from trees import FILES, KEY, blob_of, contents, fill, is_clean

from trimtab.base.errors import InputError, StoreError
from trimtab.store import open_store


def test_check(store, tmp_path):
    store.check()
    assert is_clean(tmp_path)


@pytest.mark.parametrize(
    ("address", "uri"),
    [
        ("/data/store/", "file:///data/store"),
        ("file:///data/a%20b", "file:///data/a%20b"),
        ("/data/a b%", "file:///data/a%20b%25"),
        (Path("/data/x"), "file:///data/x"),
        ("relative", None),
        ("s3://bucket-1", "s3://bucket-1"),
        ("s3://bucket.x/a/b=c/", "s3://bucket.x/a/b=c"),
    ],
)
def test_addresses(address, uri, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    assert open_store(address).uri == (uri or (Path.cwd() / address).as_uri())
    assert open_store(open_store(address).uri).uri == open_store(address).uri


@pytest.mark.parametrize(
    "address", ["", "gs://bucket/x", "minio://b/x", "file://host/x", "s3://", "s3://UP/x", "s3://abc/../x",
                "s3://abc/a//b", "s3://abc/x?y"]
)  # fmt: skip
def test_wrong_addresses(address):
    with pytest.raises(InputError, match="write s3://"):
        open_store(address)


def test_trees_of_another_store(store, tmp_path):
    other = f"{tmp_path}/other/trees/{KEY}"
    with pytest.raises(InputError, match="is in another store than .*: open /"):
        store.get(other)
    for bad in ("", "x", f"{store.uri}/trees/xyz", f"{store.uri}/trees/{KEY}/..", "hf://model"):
        with pytest.raises(InputError, match="is not a tree: write"):
            store.get(bad)


def refused(action, match: str) -> str:
    """Runs an action that must raise InputError, without trying for a minute; returns the message, one line."""
    start = time.monotonic()
    with pytest.raises(InputError, match=match) as caught:
        action()
    assert time.monotonic() - start < 30
    text = str(caught.value)
    assert "\n" not in text and caught.value.__cause__ is None
    # A traceback would print what the client raised, with signed addresses.
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return text


def test_check_of_folders(tmp_path):
    (tmp_path / "file").write_text("")
    refused(open_store(tmp_path / "file").check, "is not a folder: choose another")
    refused(open_store(tmp_path / "file/below").check, "is not a folder.*choose another")
    refused(lambda: open_store(tmp_path / "file").record(KEY, {}), "is not a folder")
    (tmp_path / "locked").mkdir(mode=0o555)
    # Root may write anywhere; another user may not even enter pytest's folder.
    nobody = os.geteuid() == 0
    if nobody:
        os.seteuid(65534)
    try:
        for path in (tmp_path / "locked", tmp_path / "locked/new"):
            refused(open_store(path).check, "refuses user .*grant it or choose another place")
    finally:
        if nobody:
            os.seteuid(0)


def test_check_of_s3(s3_server, monkeypatch):
    def check(match, bucket=s3_server.bucket, **changes):
        with monkeypatch.context() as patch:
            for name, value in (s3_server.environment | changes).items():
                patch.setenv(name, value)
            text = refused(lambda: open_store(f"s3://{bucket}/x").check(), match)
            for secret in (s3_server.secret, "wrong-secret-xyz", "wrongkeyxyz", s3_server.key):
                assert secret not in text
            return text

    refusing = "http://127.0.0.1:1"
    check("cannot .* at http://127.0.0.1:1: it refuses the connection: start it", AWS_ENDPOINT_URL=refusing)
    check("host name is not known", AWS_ENDPOINT_URL="http://store.invalid:1")
    check("AWS_ACCESS_KEY_ID is not known there: correct it", AWS_ACCESS_KEY_ID="wrongkeyxyz")
    check("AWS_SECRET_ACCESS_KEY does not belong", AWS_SECRET_ACCESS_KEY="wrong-secret-xyz")
    check("bucket 'no-such-bucket' does not exist: create it", bucket="no-such-bucket")
    check("set AWS_ACCESS_KEY_ID and AWS_SECRET", AWS_ACCESS_KEY_ID="")
    check("TLS|connection broke", AWS_ENDPOINT_URL=s3_server.endpoint.replace("http:", "https:"))
    with_keys = s3_server.endpoint.replace("//", f"//{s3_server.key}:{s3_server.secret}@")
    check("holds credentials", AWS_ENDPOINT_URL=with_keys)
    for wrong in ("localhost:9000", "ftp://x", "http://", "http://x:port", "http://x/path"):
        check("is not an address", AWS_ENDPOINT_URL=wrong)


def test_silent_and_foreign_servers(s3_server, monkeypatch):
    """A server that accepts and says nothing; one that speaks HTTP but not S3."""
    import http.server
    import socket

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        refused(open_store("s3://bucket/x").check, "does not answer in time")

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html><br></html>")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        refused(open_store("s3://bucket/x").check, "does not answer like S3|answered HTTP 501")
        server.shutdown()


def test_transfers_refuse_quickly_too(s3_server, tmp_path, monkeypatch):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    folder = fill(tmp_path / "in")
    missing = open_store("s3://no-such-bucket/x")
    refused(lambda: missing.put(folder, kind="x"), "'no-such-bucket' does not exist")
    refused(lambda: missing.get(f"{missing.uri}/trees/{KEY}"), "'no-such-bucket' does not exist")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(StoreError, match="refuses the connection"):
        open_store("s3://bucket/x").put(folder, kind="x")
    assert time.monotonic() - start < 30


def test_a_broken_download_goes_on(s3_server, tmp_path, monkeypatch):
    from urllib3.exceptions import ProtocolError

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    store = open_store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}")
    tree = store.put(fill(tmp_path / "in"), kind="x")
    offsets, real = [], store._back._open
    large = blob_of(store, tree, "a/b/c/weights.bin")

    @contextlib.contextmanager
    def breaking(key, offset=0):
        with real(key, offset) as response:
            stream = response.stream

            def one_piece(size):
                yield next(stream(size))
                raise ProtocolError("Connection broken")

            if key == large:
                offsets.append(offset)
                if len(offsets) < 3:
                    response.stream = one_piece
            yield response

    store._back._open = breaking
    assert contents(store.get(tree)) == FILES
    assert offsets == [0, 1 << 20, 2 << 20]


def test_answers_of_other_servers():
    from trimtab.store.s3_errors import explain_code

    full = explain_code("XMinioStorageFull", "Storage backend has reached …", "write x", "http://s", "b")
    assert isinstance(full, StoreError) and "no space left" in str(full)
    assert isinstance(explain_code("HTTP 503", "", "write x", "http://s", "b"), StoreError)
    denied = explain_code("AccessDenied", "", "write x", "http://s", "bucket-1")
    assert isinstance(denied, InputError) and "'bucket-1'" in str(denied)


def test_a_server_without_conditional_writes_is_refused(s3_server, monkeypatch):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}")
    request = store._back._requests.http.request
    monkeypatch.setattr(store._back._requests.http, "request", lambda *a, headers, **k: request(*a, **k))
    with pytest.raises(InputError, match="ignores If-None-Match"):
        store.release("a", {})
    assert store.releases("a") == []


def test_logs_hold_no_credential(s3_server, monkeypatch, caplog):
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    store = open_store(f"s3://{s3_server.bucket}/{uuid.uuid4().hex}")
    store._back._atomic_create = True
    monkeypatch.setattr(store._back, "names", lambda _: [])
    store._back._client._base_url = type(store._back._client._base_url)("http://127.0.0.1:1", "us-east-1")
    with caplog.at_level("INFO"), pytest.raises(StoreError, match="refuses the connection") as caught:
        store.release("a", {})
    for text in (caplog.text, str(caught.value)):
        assert s3_server.key not in text and s3_server.secret not in text and "Signature" not in text
