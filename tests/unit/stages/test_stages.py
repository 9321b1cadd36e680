"""The stages of an attempt: what a recipe asks for, what makes a key, what passes through."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from attempts import ALL, DISTILL, FULL, put
from processes import wait_for

from trimtab import stages
from trimtab.base import child, progress, signing
from trimtab.base.errors import Failure, StoreError
from trimtab.loop.documents import load, save
from trimtab.loop.state import fail
from trimtab.recipe import Recipe
from trimtab.stages import STAGES, TASKS, TENSORS, Stage, looks
from trimtab.store import open_store


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        ("{}", ["engine"]),
        ("quantize: {format: bf16}", ["quantize", "engine"]),
        ("quantize: {format: int8_wo}", ["quantize", "engine"]),
        ("quantize: {format: int4_rtn}", ["quantize", "engine"]),
        ("quantize: {format: fp8}", ["calibrate", "recalibrate", "quantize", "engine"]),
        ("quantize: {format: int8_sq}", ["calibrate", "recalibrate", "quantize", "engine"]),
        ("quantize: {format: int8_wo, scale_search: mse}", ["calibrate", "recalibrate", "quantize", "engine"]),
        ("quantize: {format: bf16, kv_cache: fp8}", ["calibrate", "recalibrate", "quantize", "engine"]),
        ("quantize: {format: int4_awq}", ["calibrate", "recalibrate", "quantize", "engine"]),
        ("quantize: {format: int4_gptq}", ["calibrate", "recalibrate", "quantize", "engine"]),
        ("quantize: {format: nvfp4}", ["calibrate", "recalibrate", "quantize", "engine"]),
        ("quantize: {format: int4_rtn, exclude_sensitive: 1}",
         ["calibrate", "recalibrate", "sensitivity", "quantize", "engine"]),
        ("prune: {method: magnitude, sparsity: 0.5}", ["prune", "engine"]),
        ("prune: {method: magnitude, pattern: '2:4'}", ["prune", "engine"]),
        ("prune: {method: magnitude, sparsity: 0.5, allocation: sensitivity}", ["calibrate", "prune", "engine"]),
        ("prune: {method: wanda, sparsity: 0.5}", ["calibrate", "prune", "engine"]),
        ("{prune: {method: sparsegpt, pattern: '2:4'}, quantize: {format: int8_wo}}",
         ["calibrate", "prune", "quantize", "engine"]),
        ("prune: {method: depth, blocks: 1}", ["calibrate", "prune", "engine"]),
        ("prune: {method: width, ffn: 0.5}", ["calibrate", "prune", "engine"]),
        ("distill: {tokens: 99}", ["distill", "engine"]),
        ("distill: {tokens: 99, generate: 9}", ["generate", "distill", "engine"]),
        ("distill: {tokens: 99, stored_logits: 8}", ["teach", "distill", "engine"]),
        ("{prune: {method: movement, sparsity: 0.5}, distill: {tokens: 99}}", ["distill", "engine"]),
        ("{prune: {method: magnitude, sparsity: 0.5}, distill: {tokens: 99}}", ["prune", "distill", "engine"]),
        ("{distill: {tokens: 99, quantization_aware: true}, quantize: {format: int4_rtn}}",
         ["distill", "quantize", "engine"]),
        (FULL, ALL),
    ],
)
def test_wanted(recipe, wanted):
    parsed = Recipe.parse(recipe)
    assert [name for name, stage in STAGES.items() if stage.wanted(parsed)] == wanted
    for name in wanted:
        json.dumps(STAGES[name].parameters(parsed))


@pytest.mark.parametrize(
    ("recipe", "weights"),
    [
        ("{distill: {tokens: 99}, prune: {method: depth, blocks: 1}}", None),
        ("{distill: {tokens: 99}, prune: {method: magnitude, sparsity: 0.5}}", {"keep_zeros": True}),
        ("{distill: {tokens: 99, quantization_aware: true}, quantize: {format: int4_rtn, kv_cache: fp8}}",
         {"rounded": {"format": "int4_rtn", "group_size": 64, "exclude": ["lm_head"]}}),
        ("{distill: {tokens: 99, quantization_aware: true}, quantize: {format: nvfp4}}",
         {"rounded": {"format": "nvfp4", "group_size": 64, "exclude": ["lm_head"]}, "rounded_inputs": True}),
    ],
)
def test_what_distillation_knows_of_the_weights(recipe, weights):
    assert STAGES["distill"].parameters(Recipe.parse(recipe)).get("weights") == weights


def test_movement_pruning_is_a_part_of_distillation():
    prune = {"method": "movement", "sparsity": 0.5, "magnitude_weight": 0.5}
    recipe = Recipe.parse({"prune": prune, "distill": {"tokens": 99}})
    assert STAGES["distill"].parameters(recipe)["weights"]["movement"].items() >= prune.items()


def test_what_a_key_depends_on(store, tmp_path):
    def key(version=1, work="a:b", parameters=None, model="model", here=None):
        stage = Stage("s", work, ("checkpoint",), "out", lambda r: True, lambda r: {}, lambda p: TENSORS, version)
        return stage.key(parameters or {}, {"checkpoint": put(store, tmp_path, model)}, here or {})

    keys = [key(), key(version=2), key(work="a:c"), key(parameters={"x": 1}), key(model="other"), key(here={"x": 1})]
    assert len(set(keys)) == 6 and key() == keys[0]


def test_the_name_of_a_stage_is_not_part_of_its_key(store, tmp_path):
    inputs = {"checkpoint": put(store, tmp_path, "model")}
    assert STAGES["calibrate"].key({}, inputs, {}) == STAGES["recalibrate"].key({}, inputs, {})


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("calibrate", "{{calibrate: {{text: {file}}}, quantize: {{format: fp8}}}}"),
        ("recalibrate", "{{calibrate: {{text: [{{text: builtin}}, {{text: {file}}}]}}, quantize: {{format: fp8}}}}"),
        ("calibrate", "{{calibrate: {{text: 'hf:{folder}'}}, quantize: {{format: fp8}}}}"),
        ("distill", "distill: {{tokens: 99, text: {file}}}"),
        ("distill", "distill: {{tokens: 99, text: [builtin, {file}]}}"),
    ],
)
def test_an_edited_text_is_another_input(name, recipe, state, worked, tmp_path):
    """The path is the same; the content decides whether the result is found."""
    (tmp_path / "texts").mkdir()
    file = tmp_path / "texts" / "a.txt"
    begun = state(recipe.format(file=file, folder=file.parent))
    hits = []
    for content in ("one", "one", "two", "one", None, None):
        file.write_text(content) if content else file.unlink(missing_ok=True)
        needed = stages.accelerators(begun)[name]
        hits.append(stages.advance(name, begun)[1].hit)
        assert needed == ("0" if hits[-1] else "1")
    assert hits == [False, True, False, True, False, True] and len(worked) == 3


def test_a_stage_runs_once(state, worked, store):
    first, result = stages.advance("quantize", state("quantize: {format: int8_wo}"))
    assert not result.hit and result.metrics.items() >= {"loss": 1.5, "peak_memory_bytes": 1000}.items()
    again, hit = stages.advance("quantize", state("{name: same, quantize: {format: int8_wo}}"))
    assert hit.hit and hit.tree == result.tree == first.trees["export"] == again.trees["export"]
    assert (first.seconds, again.seconds) == ({"quantize": 2.0}, {"quantize": 0.0})
    assert worked == ["quantize"]
    assert store.manifest(result.tree).metadata["key"]


def test_a_stage_that_is_not_asked_for_passes_its_input_on(state, worked):
    before = state("quantize: {format: int8_wo}")
    assert stages.advance("prune", before) == (before, None)
    assert stages.tree_of("checkpoint", before) == before.model
    assert stages.tree_of("export", state("{}")) == before.model
    assert worked == []


def test_a_verdict_passes_through_every_stage(state, worked):
    failed = fail(state(FULL), "prepare", Failure("unsupported", "no"))
    for name in STAGES:
        assert stages.advance(name, failed) == (failed, None)
    assert worked == []


def test_a_failure_becomes_the_verdict_and_leaves_nothing(state, monkeypatch, store):
    def call(*_, output, **__):
        open(f"{output}/half", "w").close()
        raise Failure("training_diverged", "the loss is nan at step 3 " + "x" * 1000)

    monkeypatch.setattr(child, "call", call)
    before = state("distill: {tokens: 99}")
    after, result = stages.advance("distill", before)
    assert result is None and after.trees == {} and after.verdict.failure_class == "training_diverged"
    assert after.verdict.reason.endswith("x" * 1000)
    assert not list((store._back.root / "index").glob("*")) if (store._back.root / "index").exists() else True


def test_trouble_of_the_infrastructure_raises(state, monkeypatch):
    def call(*_, **__):
        raise StoreError("no space left")

    monkeypatch.setattr(child, "call", call)
    with pytest.raises(StoreError):
        stages.advance("quantize", state("quantize: {format: int8_wo}"))


def test_a_result_whose_tree_is_gone_is_made_again(state, worked, store):
    _, result = stages.advance("quantize", state("quantize: {format: int8_wo}"))
    (store._back.root / "trees" / f"{result.tree.digest}.json").unlink()
    _, again = stages.advance("quantize", state("quantize: {format: int8_wo}"))
    assert not again.hit and again.tree == result.tree


def test_every_stage_runs_in_one_task_in_order():
    assert [name for names in TASKS.values() for name in names] == list(STAGES) == ALL


def test_a_failure_says_where(state):
    failed = fail(state(FULL), "distill", Failure("does_not_fit", "distill was killed"))
    assert (failed.verdict.stage, failed.verdict.failure_class) == ("distill", "does_not_fit")


def test_what_a_teacher_says_is_found_by_other_trainings(state, worked):
    """Another learning rate, budget or student needs neither its text nor its logits anew; another text does."""
    recipe = "distill: {{tokens: {tokens}, learning_rate: {rate}, text: {text}, generate: 9, stored_logits: 8}}"
    for tokens, rate, text in ((99, 1e-4, "builtin"), (999, 1e-5, "builtin"), (99, 1e-4, "other.txt")):
        current = state(recipe.format(tokens=tokens, rate=rate, text=text))
        for name in TASKS["distill"]:
            current, _ = stages.advance(name, current)
    assert worked == ["generate", "teach", "distill", "distill", "generate", "teach", "distill"]


def test_run_describes_what_travels(state, worked, tmp_path):
    logged = {}
    artifact = SimpleNamespace(path=str(tmp_path / "artifact"), metadata={})
    metrics = SimpleNamespace(log_metric=logged.__setitem__)
    after = load(stages.run("quantize", save(state("quantize: {format: int8_wo}")), artifact, metrics))
    assert json.loads((tmp_path / "artifact").read_text()) == after.trees["export"].model_dump()
    assert artifact.metadata["tree_digest"] == after.trees["export"].digest
    # By the names of the Model Registry's fields.
    assert artifact.metadata.items() >= {"framework": "transformers", "model_format_name": "safetensors"}.items()
    assert (artifact.metadata["quantization"], artifact.metadata["bits"]) == ("int8_wo", 8.0)
    assert logged.pop("peak_disk_bytes") >= 0
    assert logged == {"loss": 1.5, "peak_memory_bytes": 1000.0, "seconds": 2.0, "from_store": 0.0}


def test_run_of_several_stages_names_the_tree_of_the_first(state, worked, tmp_path):
    artifact = SimpleNamespace(path=str(tmp_path / "artifact"), metadata={})
    for recipe in ("{format: fp8}", "{format: mixed, effective_bits: 6}"):
        before = save(state(f"quantize: {recipe}"))
        after = load(stages.run(" ".join(TASKS["recalibrate"]), before, artifact, None))
        assert json.loads((tmp_path / "artifact").read_text()) == after.trees["calibration"].model_dump()


def test_run_of_several_stages_may_name_the_tree_of_another(state, worked, tmp_path):
    artifact = SimpleNamespace(path=str(tmp_path / "artifact"), metadata={})
    before = save(state(f"distill: {DISTILL}"))
    after = load(stages.run(" ".join(TASKS["distill"]), before, artifact, None, shown="distill"))
    assert json.loads((tmp_path / "artifact").read_text()) == after.trees["checkpoint"].model_dump()


def test_run_of_several_stages_tells_their_metrics_apart(state, worked, tmp_path):
    logged = {}
    artifact = SimpleNamespace(path=str(tmp_path / "artifact"), metadata={})
    metrics = SimpleNamespace(log_metric=logged.__setitem__)
    before = save(state("quantize: {format: mixed, effective_bits: 6}"))
    stages.run(" ".join(TASKS["recalibrate"]), before, artifact, metrics)
    clock = [name for name in logged if name.endswith("seconds") and "cpu" not in name]
    assert clock == ["seconds", "sensitivity_seconds"]


def test_run_of_a_pass_through_names_its_input(state, tmp_path):
    artifact = SimpleNamespace(path=str(tmp_path / "artifact"), metadata={})
    before = state("{}")
    stages.run("prune", save(before), artifact, None)
    assert json.loads((tmp_path / "artifact").read_text())["digest"] == before.model.digest
    assert (artifact.metadata["quantization"], artifact.metadata["bits"]) == ("none", 16.0)


def test_who_signs_takes_only_what_it_has_signed_for_found(store, worked, tmp_path):
    """Whoever may write to the store could file answers of its own under the key of a measurement."""
    keys = {}
    for name in ("validation", "other"):
        signing.generate(tmp_path / name)
        keys[name] = signing.signer({signing.KEY: str(tmp_path / name)})
    asked = (store, looks.COMPARE_SPEED, {"rounds": 3}, {})
    first = stages.cached(*asked)
    assert stages.cached(*asked).hit and first.signature is None
    signed = stages.cached(*asked, signer=keys["validation"])
    assert not signed.hit and signed.signature
    again = stages.cached(*asked, signer=keys["validation"])
    assert again.hit and again.signature == signed.signature
    assert not stages.cached(*asked, signer=keys["other"]).hit
    assert json.loads(store.read(signed.tree, "metrics.json"))["loss"] == 1.5
    about = store.manifest(signed.tree).metadata
    assert looks.COMPARE_SPEED.key({"rounds": 3}, {}, about["environment"]) == about["key"]


@pytest.mark.parametrize("shared", [True, False])
def test_runs_of_one_node_that_want_the_same_work_one_after_the_other(shared, tmp_path, monkeypatch):
    """Each store is its own, but the scratch of the work is the node's."""
    stores = [open_store(str(tmp_path / f"store-{0 if shared else number}")) for number in (1, 2)]
    begun, at_work, told = threading.Event(), [], []
    monkeypatch.setattr(progress, "report", lambda stage, text, *_: told.append(text))

    def call(work, *, output, scratch, parameters):
        begun.set()
        (Path(scratch) / "blocks").mkdir(parents=True)  # there is nobody else
        at_work.append(work)
        assert at_work[1:] or wait_for(lambda: any("another run on this machine" in text for text in told))
        (Path(output) / "made").write_text("done")
        (Path(scratch) / "blocks").rmdir()
        return child.Done({}, 1.0, 1000)

    def run(store):
        return stages.cached(store, looks.COMPARE_SPEED, {"rounds": 3}, {}, call=call)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, stores[0])
        assert begun.wait(60)
        second = pool.submit(run, stores[1])
        assert not first.result(60).hit and second.result(60).hit == shared
    assert len(at_work) == (1 if shared else 2)
