"""What a stage costs that has nothing to do: a pass-through and a result found in the store, through kfp.local.

Run: python benchmarks/pipeline_overhead.py [--quick]
The last line is one JSON object: medians in seconds, and whether torch was imported.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

from kfp import dsl, local

from trimtab import stages
from trimtab.components.quantization.component import quantize
from trimtab.pipelines.decisions import carry
from trimtab.recipe import Recipe
from trimtab.state import State
from trimtab.store import open_store


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three repeats instead of ten")
    repeats = 3 if parser.parse_args().quick else 10
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRIMTAB_CACHE"] = str(Path(folder) / "cache")
        state = _state(Path(folder))
        hit = state.model_copy(update={"recipe": Recipe.parse("quantize: {format: int8_wo}")})
        _record_result(hit)
        figures = {
            "kfp_alone": _seconds(folder, repeats, carry, state),
            "pass_through": _seconds(folder, repeats, quantize, state),
            "from_store": _seconds(folder, repeats, quantize, hit),
        }
    print(f"{'task':<14}{'seconds':>9}")
    for name, seconds in figures.items():
        print(f"{name:<14}{seconds:>9.2f}")
    print(json.dumps({**figures, "repeats": repeats, "torch_imported": "torch" in sys.modules}))
    return 0


def _state(folder: Path) -> State:
    store = open_store(str(folder / "store"))
    source = folder / "model"
    source.mkdir()
    (source / "weights").write_bytes(b"0" * 1000)
    return State(store=store.uri, goal="fit_larger_model", target="cpu", model=store.put(source, kind="checkpoint"))


def _record_result(state: State) -> None:
    """Files a result under the key that the stage will look for."""
    stage, store = stages.STAGES["quantize"], open_store(state.store)
    key = stages.key_here(stage, state)
    store.record(key, {"tree": state.model.model_dump(), "metrics": {}, "seconds": 1.0})


def _seconds(folder: str, repeats: int, component: object, state: State) -> float:
    @dsl.pipeline(name="overhead")
    def pipeline(state: str) -> None:
        if component is carry:
            carry(state=state)
        else:
            dataset = dsl.importer(artifact_uri="nowhere", artifact_class=dsl.Dataset, reimport=False)
            model = dsl.importer(artifact_uri="nowhere", artifact_class=dsl.Model, reimport=False)
            component(state=state, checkpoint=model.output, calibration=dataset.output)

    taken = []
    for _ in range(repeats):
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            local.init(local.SubprocessRunner(use_venv=False), pipeline_root=f"{folder}/root", raise_on_error=True)
            started = time.perf_counter()
            pipeline(state=state.to_json())
            taken.append(time.perf_counter() - started)
    return round(statistics.median(taken), 3)


if __name__ == "__main__":
    sys.exit(main())
