"""An unchanged model that is scored block by block: what validation asks of it, and what it makes of the answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from trimtab.base.errors import Failure
from trimtab.components.engine.work import build
from trimtab.components.validation.evaluation import measure
from trimtab.components.validation.integrity import reload
from trimtab.components.validation.page import numbers
from trimtab.judge import Verdict
from trimtab.loop import evidence
from trimtab.model.facts import inspect
from trimtab.recipe import Engine, Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.runtime.engines import kept
from trimtab.runtime.engines.by_block import BlockwiseEngine
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.stages import looks


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory):
    """A function: whether by block -> the metrics and the folder of an evaluation of the tiny model."""
    tasks = tiny.write_tasks(tmp_path_factory.mktemp("tasks"), model, items=20)
    evaluation = Evaluation(
        tasks=(tiny.TASK,), task_path=str(tasks), items=(12, 0, 0), windows=(3, 0, 0), confirm_items=0, window_tokens=32
    )

    def call(blocks: bool) -> tuple[dict, Path]:
        engine, output = tmp_path_factory.mktemp("engine"), tmp_path_factory.mktemp("output")
        settings = Engine(by_block=blocks, max_seq_len=128, max_num_tokens=128, max_batch_size=4)
        built = build(str(model), str(engine), "", settings.model_dump(mode="json"))
        assert built["layers"] == 0 and 0 < built["weight_bytes"] < (150_000 if blocks else 400_000)
        asked = looks.evaluation_parameters(evaluation, {tiny.TASK: [0, 12]}, [0, 3], not blocks, max_length=64)
        return measure.evaluate(str(engine), str(model), str(output), "", asked), output

    yield call
    kept.close()


def test_it_is_asked_twice_and_answers_as_the_whole_model(measured, monkeypatch):
    """Once for all windows and once for all items, of whatever task; neither for text nor for speed."""
    asked = []
    plain = BlockwiseEngine._pass
    monkeypatch.setattr(BlockwiseEngine, "_pass", lambda *args: asked.append(len(args[1])) or plain(*args))
    found, folder = measured(True)
    assert len(asked) == 3  # one of them when the engine was built
    whole, other = measured(False)
    assert {"items", "windows", "accuracy"} < found.keys() and not {"degenerate", "decode_tokens_per_second"} & {*found}
    assert {"degenerate", "decode_tokens_per_second"} < whole.keys()
    assert found["log_perplexity"] == pytest.approx(whole["log_perplexity"], rel=2e-3)
    lines = ((each / "items.jsonl").read_text().splitlines() for each in (folder, other))
    ours, theirs = ([json.loads(line) for line in each] for each in lines)
    assert [item["id"] for item in ours] == [item["id"] for item in theirs] and len(ours) == 12
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine["answers"] == pytest.approx(yours["answers"], rel=2e-2)
    with np.load(folder / evidence.TEXT) as text, np.load(other / evidence.TEXT) as expected:
        assert text["tokens"].shape == expected["tokens"].shape == (3, 31, 20)
        np.testing.assert_allclose(text["nll"].sum(), expected["nll"].sum(), rtol=2e-3)
    assert json.loads((folder / "arithmetic.json").read_text()).endswith(", block by block")


def test_neither_speed_nor_memory_of_it_are_a_figure(model):
    facts = inspect(model)
    files = {"bytes": 1000, "quantized_share": 1.0}
    found = evidence.measurements(
        facts, Recipe(engine=Engine(by_block=True)), "cpu", files, {"peak_memory_bytes": 10**9}
    )
    assert found.by_block and found.bytes == 1000
    assert (found.decode_tokens_per_second, found.throughput_tokens_per_second, found.peak_memory_bytes) == (0, 0, 0)
    told = numbers(Verdict(outcome="baseline", reason="unchanged", measurements=found))
    assert told["bytes"] == 1000
    assert not {"decode_tokens_per_second", "throughput_tokens_per_second", "peak_memory_bytes", "by_block"} & {*told}


@pytest.mark.parametrize(
    ("baseline", "blamed"), [({"degenerate": 0.2}, True), ({"degenerate": 0.9}, False), ({}, False)]
)
def test_an_attempt_is_blamed_for_a_loop_where_the_baseline_is_known_to_write_none(baseline, blamed):
    assert (evidence.began_to_repeat(baseline, {"degenerate": 0.8}) is not None) == blamed


def test_an_engine_by_block_closes_no_other_and_has_room_beside_each(model, tmp_path, monkeypatch):
    other, places = tmp_path / "other", []
    shutil.copytree(model, other)
    for export, blocks in ((model, True), (other, False)):
        places.append((tmp_path / str(blocks), export))
        places[-1][0].mkdir()
        settings = Engine(by_block=blocks, max_seq_len=64).model_dump(mode="json")
        build(str(export), str(places[-1][0]), "", settings)
    kept.close()
    whole = kept.built(*places[1])
    monkeypatch.setattr(kept, "_memory", lambda: 2 * whole.weight_bytes)
    blocks = kept.built(*places[0])
    assert isinstance(blocks, BlockwiseEngine) and isinstance(whole, TorchEngine)
    assert kept.built(*places[1]) is whole and kept.built(*places[0]) is blocks
    kept.close()


def test_what_one_device_does_not_hold_is_not_loaded_to_excuse_an_export(model, monkeypatch):
    def too_large(*_, **__):
        raise Failure("does_not_fit", "weights did not fit")

    monkeypatch.setattr(kept, "loaded", too_large)
    assert reload.check(model, model) == {"skipped": "it does not fit the memory of one CPU", "outputs": {}}
    monkeypatch.setattr(kept, "_memory", lambda: 1000)
    assert reload._is_excused(model, model)
