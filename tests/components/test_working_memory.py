"""The model of memory against what work really holds: a model of 50 million parameters on a CPU.

A process's own memory is left out: the largest resident memory is reset before the work, and what was resident then is
taken from it. `benchmarks/resources.py` measures whole processes, larger models and GPUs.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny

from trimtab.components.calibration.work import calibrate
from trimtab.components.engine.work import build
from trimtab.components.quantization.work import quantize
from trimtab.model.facts import inspect
from trimtab.model.hardware import GB, target
from trimtab.model.working_memory import PROCESS
from trimtab.planning.resources import needs
from trimtab.recipe import Recipe

#: The aim; and bytes that come with threads, buffers of products and what allocators keep, whatever the model's size.
TOLERANCE, BESIDE = 0.15, 64 << 20
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    base = tmp_path_factory.mktemp("middle")
    tiny.write_model(base / "model", layers=5, hidden=1024)
    small = tiny.write_model(base / "small", layers=1)  # what is loaded with the first work is no work's
    (base / "warm").mkdir()
    calibrate(str(small), str(base / "warm"), "", {"samples": 1, "length": 16})
    for name in ("calibration", "export", "engine"):
        (base / name).mkdir()
    yield {name: str(base / name) for name in ("model", "calibration", "export", "engine", "scratch")}


def test_forecasts_are_what_work_holds(folders):
    forecast = needs(inspect(Path(folders["model"])), RECIPE, target("cpu", 24 * GB))
    model, calibration, export, scratch = (folders[n] for n in ("model", "calibration", "export", "scratch"))
    parameters = RECIPE.model_dump(mode="json")
    works = {
        "calibrate": lambda: calibrate(model, calibration, scratch, parameters["calibrate"]),
        "quantize": lambda: quantize(model, calibration, None, export, scratch, parameters["quantize"]),
        "engine": lambda: build(export, folders["engine"], scratch, parameters["engine"]),
    }
    found = {name: (held(work), forecast[name].host_bytes - PROCESS["cpu"]) for name, work in works.items()}
    wrong = {name: pair for name, pair in found.items() if not abs(pair[0] - pair[1]) <= TOLERANCE * pair[1] + BESIDE}
    assert not wrong, "stage: (held, forecast)"
