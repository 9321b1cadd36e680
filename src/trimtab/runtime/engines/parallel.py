"""The torch engine over several devices: it starts a process for each with torchrun, and asks all of them at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trimtab.base import child
from trimtab.base.errors import Failure, StageError
from trimtab.recipe import Engine as Settings
from trimtab.runtime.checkpoint.model_files import load_tokenizer
from trimtab.runtime.engines.batching import ScoringRequest
from trimtab.runtime.engines.by_block import BlockwiseEngine
from trimtab.runtime.engines.protocol import Engine, Prediction
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.kv_cache.emulated import ServedKVCache
from trimtab.serving.record import Built

#: Seconds between looks at whether the processes still live.
_LOOK = 1.0
#: Seconds that the other ranks have after one has failed: they refuse the same thing, or wait for it in vain.
_GRACE = 10.0
#: Seconds that the processes have to end when they are told to.
_END = 30.0
_ENDED = "a rank of the engine ended without an answer; see its log above"


class ParallelEngine:
    """Runs an export folder in `settings.world_size` processes, behind the protocol of `runtime.engines.protocol`.

    Each is a `TorchEngine` with a part of the model (`runtime.parallel.shards`), on a GPU of its own or on the CPU's
    cores. All compute the same answers; that they do is checked.

    Raises:
        Failure: `unsupported`, the machine has fewer GPUs, or the model cannot be shared out so; and as `TorchEngine`.
        StageError: a process ended; its log is above.
    """

    def __init__(self, folder: Path, settings: Settings, kv_cache: ServedKVCache = "export"):
        self.folder, self.settings = Path(folder), settings
        count = settings.world_size
        if torch.cuda.is_available() and torch.cuda.device_count() < count:
            have = torch.cuda.device_count()
            tensor, pipeline = settings.tensor_parallel_size, settings.pipeline_parallel_size
            what = f"engine: tensor_parallel_size {tensor} x pipeline_parallel_size {pipeline}"
            raise Failure("unsupported", f"{what} needs {count} GPUs, and there are {have}")
        self._scratch = tempfile.TemporaryDirectory(prefix="trimtab-ranks-")  # nobody else may enter it
        address = f"{self._scratch.name}/asked"
        request = {
            "folder": str(self.folder),
            "settings": settings.model_dump(mode="json"),
            "kv_cache": kv_cache,
            "address": address,
        }
        self._ranks: list[Connection] = []
        self._waiting: list[Connection] = []
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(address)
            door.listen(count)
            self._process = _start(count, request, self._scratch.name)
            try:
                while len(self._ranks) < count:
                    if wait([door], _LOOK):
                        self._ranks.append(Connection(door.accept()[0].detach()))
                    elif self._process.poll() is not None:
                        raise StageError(f"the {count} ranks of the engine did not start; see their log above")
                self._collect()
            except BaseException:
                self._kill()
                raise

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder)

    @property
    def weight_bytes(self) -> int:
        return sum(self._ask("weight_bytes"))

    @property
    def device_bytes(self) -> int:
        return self._ask("device_bytes")[0]

    @property
    def decode_path(self) -> str:
        """How `decode_speed` last ran its steps."""
        return self._ask("decode_path")[0]

    @property
    def arithmetic(self) -> str:
        return self._ask("arithmetic")[0]

    def kernels(self) -> dict[str, dict[str, Any]]:
        """As the protocol says: each stage tells of its own blocks."""
        return {name: kernel for found in self._ask("kernels") for name, kernel in found.items()}

    def loglikelihood(self, requests: list[ScoringRequest]) -> list[tuple[float, bool]]:
        """As `TorchEngine.loglikelihood`."""
        return [(likelihood, greedy) for likelihood, greedy in self._agreed("loglikelihood", requests)]

    def nll(self, windows: torch.Tensor) -> list[float]:
        """As `TorchEngine.nll`."""
        return self._agreed("nll", windows.tolist())

    def predict(self, windows: torch.Tensor, count: int) -> Prediction:
        """As `TorchEngine.predict`."""
        return Prediction(*self._agreed("predict", windows.tolist(), count))

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, until: Sequence[Sequence[str]] = ()
    ) -> list[list[int]]:
        """As `TorchEngine.generate`."""
        return self._agreed("generate", prompts, max_new_tokens, [list(texts) for texts in until])

    def decode_speed(self, batch_size: int, prompt_tokens: int, new_tokens: int, repeats: int) -> list[float]:
        """As `TorchEngine.decode_speed`, by the clock of the first process."""
        return self._ask("decode_speed", batch_size, prompt_tokens, new_tokens, repeats)[0]

    def close(self) -> None:
        """Ends the processes; the engine answers no more."""
        try:
            for rank in self._ranks:
                rank.send_bytes(b"null")
            self._process.wait(_END)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._kill()
        self._close()

    def _agreed(self, name: str, *arguments: Any) -> Any:
        first, *others = self._ask(name, *arguments)
        # As text, for NaN differs from itself.
        if any(repr(other) != repr(first) for other in others):
            raise StageError(f"{name}: the ranks of the engine disagree, which is a fault of trimtab or of a device")
        return first

    def _ask(self, name: str, *arguments: Any) -> list[Any]:
        """Calls a method of every rank's engine, or reads an attribute, and returns what each says, in order."""
        if not self._ranks:
            raise StageError("the engine was closed, or one of its ranks failed before; open it again")
        call = json.dumps([name, arguments]).encode()
        try:
            self._waiting = list(self._ranks)
            for rank in self._ranks:
                rank.send_bytes(call)
            return self._collect()
        except BrokenPipeError:
            self._kill()
            raise StageError(_ENDED) from None
        except BaseException:
            if self._process.poll() is not None or self._waiting:
                self._kill()
            raise

    def _collect(self) -> list[Any]:
        """Returns each rank's answer, or raises the first failure.

        When all have failed alike the engine goes on; else some wait for what never comes, and stay in `_waiting`.
        """
        self._waiting = list(self._ranks)
        answers: dict[int, dict[str, Any]] = {}
        failure, until = None, float("inf")
        while self._waiting and time.monotonic() < until:
            for rank in wait(self._waiting, _LOOK):
                try:
                    answer = json.loads(rank.recv_bytes())
                except (EOFError, ConnectionResetError):
                    raise failure or StageError(_ENDED) from None
                self._waiting.remove(rank)
                answers[answer["rank"]] = answer
                try:
                    child.done({"value": None, "seconds": 0.0, "peak_memory_bytes": 0} | answer)
                except Exception as error:
                    failure, until = failure or error, min(until, time.monotonic() + _GRACE)
        if failure:
            raise failure
        return [answers[number]["value"] for number in range(len(answers))]

    def _kill(self) -> None:
        self._process.kill()  # its children die with it
        self._process.wait()
        self._close()

    def _close(self) -> None:
        for rank in self._ranks:
            rank.close()
        self._ranks = []
        self._scratch.cleanup()


def _start(count: int, request: dict[str, Any], scratch: str) -> subprocess.Popen:
    """Starts torchrun, which ends all ranks when one has died."""
    options = ["--standalone", f"--nproc-per-node={count}", f"--log-dir={scratch}"]
    options += ["-m", "trimtab.runtime.engines.rank"]
    # torchrun would give each rank a single core.
    environment = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count)), **os.environ}
    command = [sys.executable, "-m", "torch.distributed.run", *options, json.dumps(request)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)


def open_engine(built: Built, engine: Path, export: Path, kv_cache: ServedKVCache) -> Engine:
    """Opens the embedded engine: see `runtime.engines.backends.open_engine`."""
    if built.settings.by_block:
        return BlockwiseEngine(export, built.settings)
    if built.settings.world_size > 1:
        return ParallelEngine(export, built.settings, kv_cache)
    return TorchEngine(export, built.settings, kv_cache=kv_cache)
