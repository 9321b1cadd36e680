"""The model of memory against what work really holds: a model of 50 million parameters on a CPU.

A process's own memory is left out: the largest resident memory is reset before the work, and what was resident then is
taken from it. `benchmarks/resources.py` measures whole processes, larger models and GPUs.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trimtab.components.calibration.work import calibrate
from trimtab.components.engine.work import build
from trimtab.components.quantization.work import quantize
from trimtab.model.facts import inspect
from trimtab.model.hardware import GB, target
from trimtab.model.working_memory import PROCESS
from trimtab.planning.resources import needs
from trimtab.recipe import Recipe

#: The aim; and bytes that come with threads and buffers of products, whatever the size of the model.
TOLERANCE, BESIDE = 0.15, 16 << 20
RECIPE = Recipe.parse(
    "{calibrate: {samples: 4, length: 512}, quantize: {format: int8_sq}, engine: {max_batch_size: 1, max_seq_len: 64}}"
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(what: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{what}:")[2].split()[0])


def held(work: Callable[[], object]) -> int:
    """Returns the bytes that work holds at once, at most."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def measure(base: Path) -> dict[str, int]:
    """Returns what each stage's work holds; in a process of its own, for in one that did other work before, allocators
    hold what they do not need, or use it again."""
    for name in ("warm", "calibration", "export", "engine"):
        (base / name).mkdir()
    model, calibration, export, scratch = (str(base / name) for name in ("model", "calibration", "export", "scratch"))
    parameters = RECIPE.model_dump(mode="json")
    calibrate(str(base / "small"), str(base / "warm"), "", parameters["calibrate"])  # loads what all work loads
    works = {
        "calibrate": lambda: calibrate(model, calibration, scratch, parameters["calibrate"]),
        "quantize": lambda: quantize(model, calibration, None, export, scratch, parameters["quantize"]),
        "engine": lambda: build(export, str(base / "engine"), scratch, parameters["engine"]),
    }
    return {name: held(work) for name, work in works.items()}


def test_forecasts_are_what_work_holds(tmp_path: Path) -> None:
    import tiny  # which the measuring process does not find

    tiny.write_model(tmp_path / "model", layers=5, hidden=1024)
    tiny.write_model(tmp_path / "small", layers=1)
    # glibc would keep what is freed of tensors as small as these, in an arena for each thread.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    forecast = needs(inspect(tmp_path / "model"), RECIPE, target("cpu", 24 * GB))
    pairs = {name: (size, forecast[name].host_bytes - PROCESS["cpu"]) for name, size in found.items()}
    wrong = {name: pair for name, pair in pairs.items() if not abs(pair[0] - pair[1]) <= TOLERANCE * pair[1] + BESIDE}
    assert not wrong, "stage: (held, forecast)"


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
