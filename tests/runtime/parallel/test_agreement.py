"""Two processes record their steps together or not at all; what records on a CPU here only runs the step again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.recipe import Engine
from trimtab.runtime.decoder import decode
from trimtab.runtime.decoder.assemble import assemble
from trimtab.runtime.parallel import shards, torchrun

CPU = torch.device("cpu")


LOOP = "loop, as no CUDA graph could be made: RuntimeError: "
#: What goes wrong in the second rank alone -> how each decodes.
FAULTS = {
    "nothing": ["CUDA graph, static cache"] * 2,
    "recording": [f"{LOOP}another rank could not record its step", f"{LOOP}not permitted when stream is capturing"],
    "replay": [f"{LOOP}a replayed step has other logits than the step itself"] * 2,
}


@pytest.fixture(scope="module")
def told(plain_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes says of every fault."""
    out = tmp_path_factory.mktemp("ranks")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--log-dir={out}"]
    command = [*run, __file__, str(plain_folder), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("fault", FAULTS)
def test_ranks_agree_how_they_decode(told: list[dict[str, Any]], fault: str) -> None:
    first, second = (rank[fault] for rank in told)
    assert [first["path"], second["path"]] == FAULTS[fault]
    assert first["tokens"] == second["tokens"] and len(set(sum(first["tokens"], []))) > 2


@torch.inference_mode()
def main(folder: str, out: str) -> None:
    """One rank: decodes with each fault in turn."""
    with torchrun.joined():
        place = shards.place(Engine(tensor_parallel_size=2), CPU)
        model, agree = assemble(Path(folder), CPU, place=place), shards.agreement(place, CPU)
        found = {}
        for fault in FAULTS:
            decode.Recorded._warm_up = lambda self: None
            decode.Recorded._record = recording(fault if place.tensor == 1 else "nothing")
            decoder = decode.recorded(model, 2, 8, 6, agree=agree)
            decoder.prefill(torch.arange(3, 19).view(2, 8))
            found[fault] = {"path": decoder.path, "tokens": decoder.steps(6).tolist()}
        (Path(out) / f"{torchrun.rank()}.json").write_text(json.dumps(found))


def recording(fault: str) -> Callable[[decode.Recorded], Callable[[], None]]:
    def record(self: decode.Recorded) -> Callable[[], None]:
        if fault == "recording":
            raise RuntimeError("not permitted when stream is capturing")

        def replay() -> None:
            self._step()
            if fault == "replay":
                self._logits = self._logits * 1.5

        return replay

    return record


if __name__ == "__main__":
    main(*sys.argv[1:])
