"""What the tasks of an attempt need: accelerators, memory and images; and what they used."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from attempts import ALL, FULL

from trimtab import stages
from trimtab.base import child
from trimtab.base.errors import Failure
from trimtab.judge import Verdict
from trimtab.loop.documents import load, save
from trimtab.loop.state import Brief, fail
from trimtab.planning import resources
from trimtab.recipe import Recipe
from trimtab.stages import OPTIONAL, TASKS, usage


@pytest.mark.parametrize(
    ("recipe", "target", "expected"),
    [
        (FULL, "h100", dict.fromkeys((*TASKS, "validate"), "1")),
        (FULL, "cpu", {}),
        ("quantize: {format: int8_wo}", "h100", {"quantize": "1", "engine": "1", "validate": "1"}),
        ("{quantize: {format: fp8}, engine: {tensor_parallel_size: 4}}", "h100",
         {"calibrate": "1", "recalibrate": "1", "quantize": "1", "engine": "4", "validate": "4"}),
        ("engine: {tensor_parallel_size: 2, pipeline_parallel_size: 2}", "h100", {"engine": "4", "validate": "4"}),
        ("distill: {tokens: 99, processes: 4}", "h100", {"distill": "4", "engine": "1", "validate": "1"}),
    ],
)  # fmt: skip
def test_accelerators(recipe, target, expected, state):
    begun = state(recipe, target)
    assert stages.accelerators(begun) == dict.fromkeys((*TASKS, "validate"), "0") | expected


def test_an_attempt_is_judged_where_its_baseline_fits_too(state):
    """Validation measures both."""
    verdict = Verdict(outcome="baseline", reason="the model unchanged")
    baseline = Brief(recipe=Recipe.parse("engine: {backend: trtllm, tensor_parallel_size: 4}"), verdict=verdict)
    begun = state("{quantize: {format: fp8}, engine: {backend: trtllm}}", "h100")
    assert stages.accelerators(begun)["validate"] == "1"
    assert stages.accelerators(begun.model_copy(update={"baseline": baseline}))["validate"] == "4"


def test_what_exists_needs_no_accelerator(state, worked):
    """Results are followed from stage to stage; behind the first that is missing, every wanted stage must run, and a
    task needs an accelerator as long as any of its stages must: `recalibrate` and `sensitivity` are one. The
    results of the engine and of validation are those of a device, so they look for them on it."""
    begun = state(FULL)
    seen = {}
    current = begun
    for name in ALL:
        current, _ = stages.advance(name, current)
        seen[name] = [task for task, count in stages.accelerators(begun).items() if count != "0"]
    assert seen == {
        "calibrate": ["prune", "distill", "recalibrate", "quantize", "engine", "validate"],
        "prune": ["distill", "recalibrate", "quantize", "engine", "validate"],
        "generate": ["distill", "recalibrate", "quantize", "engine", "validate"],
        "teach": ["distill", "recalibrate", "quantize", "engine", "validate"],
        "distill": ["recalibrate", "quantize", "engine", "validate"],
        "recalibrate": ["recalibrate", "quantize", "engine", "validate"],
        "sensitivity": ["quantize", "engine", "validate"],
        "quantize": ["engine", "validate"],
        "engine": ["engine", "validate"],
    }


def test_a_later_stage_of_a_task_alone_needs_an_accelerator(state, worked):
    """An attempt that shares the statistics of an earlier one, and wants the harms besides."""
    stages.advance("calibrate", state("quantize: {format: fp8}"))
    needed = stages.accelerators(state("quantize: {format: fp8, exclude_sensitive: 1}"))
    assert (needed["calibrate"], needed["recalibrate"]) == ("0", "1")


def test_a_verdict_needs_no_accelerator(state):
    failed = fail(state(FULL), "prepare", Failure("unsupported", "no"))
    assert set(stages.accelerators(failed).values()) == {"0"}


NODES, TAINT = {"gpu": "h100"}, [{"key": "gpu", "operator": "Exists"}]
OWN = {"cpu": "8", "memory": "64Gi", "image": "cuda"}
OFFERED = {"nodes": NODES, "tolerations": TAINT, "small": "cpu", "tasks": dict.fromkeys(OPTIONAL, OWN)}
LITTLE = {"accelerators": "0", "nodes": {}, "tolerations": [], "cpu": "500m", "memory": "1Gi"}


def test_what_only_passes_on_asks_for_next_to_nothing(state):
    found = stages.machines(state("quantize: {format: int8_wo}"), OFFERED)
    assert found["distill"] == {**LITTLE, "image": "cpu"}
    assert found["quantize"] == {"accelerators": "1", "nodes": NODES, "tolerations": TAINT, **OWN}
    assert found["engine"] == found["validate"] == {"accelerators": "1", "nodes": NODES}


def test_what_only_looks_up_does_so_in_its_own_image(state, worked):
    """Its libraries are part of what the result is found by."""
    begun = state("quantize: {format: int8_wo}")
    stages.advance("quantize", begun)
    assert stages.machines(begun, OFFERED)["quantize"] == {**LITTLE, "image": "cuda"}


def test_libraries_are_told_by_a_pass_through_in_the_image_of_the_stage(state):
    """Those that nobody knows yet; in another image it leaves what is known alone."""
    unknown = state("{}").model_copy(update={"libraries": {}})
    assert stages.machines(unknown, OFFERED)["distill"] == {**LITTLE, "image": "cuda"}
    known = unknown.model_copy(update={"libraries": {"prune": {"torch": "of-its-image"}}})
    after = load(stages.run("prune", save(known), SimpleNamespace(path="/dev/null", metadata={}), None))
    assert after.libraries["prune"] == {"torch": "of-its-image"}


def test_work_on_a_processor_has_its_memory_and_no_gpu_node(state):
    found = stages.machines(state("quantize: {format: int8_wo}", "cpu"), OFFERED)
    assert found["quantize"] == {"accelerators": "0", "nodes": {}, "tolerations": [], **OWN}


def test_memory_that_the_profile_does_not_name_is_as_much_as_is_forecast(state, facts_known):
    offered = {**OFFERED, "tasks": dict.fromkeys(OPTIONAL, {**OWN, "memory": ""})}
    found = stages.machines(state("quantize: {format: int8_wo}"), offered)
    assert found["distill"]["memory"] == "1Gi"
    forecast = stages.forecast(state("quantize: {format: int8_wo}"))["quantize"].host_bytes
    assert found["quantize"]["memory"] == resources.quantity(forecast) and found["quantize"]["memory"] != "1Gi"


def test_what_this_machine_cannot_do_is_refused_before_it_begins(state, facts_known, monkeypatch):
    begun = state("{prune: {method: depth, blocks: 1}, quantize: {format: int8_wo}}", "cpu")
    monkeypatch.setattr(resources, "machine_memory", lambda: 500_000_000)
    monkeypatch.delenv(child.RUN_PID, raising=False)
    assert stages.refuse_here(begun) == begun, "in a cluster each task has a machine of its own"
    monkeypatch.setenv(child.RUN_PID, "1")
    refused = stages.refuse_here(begun).verdict
    assert (refused.failure_class, refused.stage) == ("does_not_fit", "calibrate")
    assert refused.reason.endswith("GB of this machine's memory, and there are 0.5 GB")
    monkeypatch.setattr(resources, "machine_memory", lambda: 50_000_000_000)
    assert stages.refuse_here(begun) == begun


def test_what_a_stage_used_is_kept_with_its_result(state, worked):
    begun = state("quantize: {format: int8_wo}")
    for _ in range(2):  # the second time it is found
        after, result = stages.advance("quantize", begun)
        used = load(save(after)).used["quantize"]
        assert (used.host_bytes, used.seconds) == (1000, 2.0) and used.disk_bytes == result.metrics["peak_disk_bytes"]


def test_the_most_that_was_seen_of_the_disk(tmp_path):
    with usage.disk_watched(tmp_path) as peak:
        (tmp_path / "a").write_bytes(bytes(8192))
        (tmp_path / "b").hardlink_to(tmp_path / "a")
        peak.look()
        (tmp_path / "a").write_bytes(b"")
    assert peak.bytes == 8192
