"""benchmarks/pipeline_size.py: what a run may weigh on a Kubeflow backend, with the profile of the GPU overlay."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
#: By the number of attempts: the most of the 1 MiB that Argo takes for a Workflow whose run has tried them all, in %.
#: Above 100 Argo ends the run in Error; the computation may be wrong by a tenth.
MOST = {1: 25, 5: 50, 10: 75}


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("pipeline_size")


@pytest.mark.parametrize("attempts", MOST)
@pytest.mark.parametrize("pipeline", ["optimize", "rebuild"])
def test_a_run_fits_into_its_workflow(attempts, pipeline, benchmark):
    found = benchmark.measure(attempts, str(benchmark.GPU), pipeline)
    assert found["file_bytes"] <= 150_000 and found["components"] <= 60
    assert found["tasks"] > 11 * attempts, "an attempt has eight tasks, and three follow from it"
    assert found["submitted_percent"] < found["finished_percent"] <= MOST[attempts]
