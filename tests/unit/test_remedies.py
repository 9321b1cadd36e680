"""Remedies: what a message tells people to write is accepted where it tells them to write it."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from trimtab.base.errors import InputError, nearest
from trimtab.base.schema_errors import explain
from trimtab.catalog.goals import GOALS
from trimtab.components.deployment.rollout.settings import Rollout
from trimtab.model.hardware import TARGETS, target
from trimtab.recipe import Format, Recipe, workload
from trimtab.recipe.evaluation import Evaluation
from trimtab.stages.profile import Profile

ROLLOUT = "{service: a, namespace: b, image: 'i:1', command: [x], loader: 'l:1'}"

MESSAGES = [
    # a document in its own name, a field in the wrong section
    (Recipe, "recipe: {quantize: {format: fp8}}",
     "recipe: unknown key 'recipe'; the file is the recipe itself: leave out 'recipe:', and write its fields at"),
    (Profile, "profile: {shared_memory: 16Gi}", "the file is the profile itself: leave out 'profile:'"),
    (Recipe, "format: fp8", "format: unknown key 'format'; write it inside 'quantize' (valid here: accept,"),
    (Recipe, "seed: 1", "seed: unknown key 'seed'; write it inside 'calibrate' or inside 'distill'"),
    (Recipe, "quantize: {format: fp8, accept: {}}", "unknown key 'accept'; write it outside of all sections (valid"),
    # one value in place of a section
    (Recipe, "quantize: fp8", "quantize: 'fp8' is not a mapping; write {format: fp8}"),
    (Recipe, "quantize: FP8", "quantize: 'FP8' is not a mapping; write {format: fp8}"),
    (Recipe, "engine: trtllm", "engine: 'trtllm' is not a mapping; write {backend: trtllm}"),
    (Recipe, "accept: 0.9", "accept: 0.9 is not a mapping; write {min_recovery: 0.9}"),
    (Recipe, "distill: 1000", "distill: 1000 is not a mapping; write {tokens: 1000}"),
    (Recipe, "workload: s3://b/traffic/",
     "workload: 's3://b/traffic/' is not a mapping; write {recorded: 's3://b/traffic/'}"),
    (Recipe, "prune: depth", "prune: 'depth' is not a mapping; write its fields: "),
    (Recipe, "{prune: {method: }}", "prune.method: None is not valid"),
    (Recipe, "quantize: {format: fp8}\naccept:\n", "accept: is empty; remove it, or write its fields: advisory, "),
    (Recipe, "quantize: {}", "quantize.format: is required; write one of: fp32, fp16"),
    (Recipe, "prune: {blocks: 1}", "prune.method: is required; write one of: "),
    (Profile, "gpu: nvidia.com/gpu", "gpu: 'nvidia.com/gpu' is not a mapping; write {resource: nvidia.com/gpu}"),
    (Profile, "environment: x", "environment: 'x' is not a mapping; write names and their values, such as {name: v"),
    # lists
    (Evaluation, "items: 10", "items: 10 is not a list; write [10, 10, 10]"),
    (Evaluation, "items: many", "items: 'many' is not a list; write [400, 600, 1000]"),
    (Evaluation, "items: [1, 2, 3, 4]", "items: [1, 2, 3, 4] has 4 entries and 3 are needed; write such as [400,"),
    (Recipe, "quantize: {format: fp8, exclude: '*.up_proj'}", "is not a list; write ['*.up_proj']"),
    (Rollout, ROLLOUT.replace("[x]", "vllm serve"), "command: 'vllm serve' is not a list; write [vllm serve]"),
    # names in another case or with another separator
    (Recipe, "quantize: {format: INT8_WO}", "'INT8_WO' is not valid; write 'int8_wo' (valid: fp32,"),
    (Recipe, "quantize: {format: int4-awq}", "'int4-awq' is not valid; write 'int4_awq' (valid: fp32,"),
    (Recipe, "engine: {backend: TRTLLM}", "'TRTLLM' is not valid; write 'trtllm' (valid: torch,"),
    # numbers
    (Recipe, "accept: {min_recovery: 95}", "95 should be less than or equal to 1; write 0.95"),
    (Recipe, "accept: {min_recovery: 95%}", "'95%' should be a valid number, unable to parse string as a number; wri"),
    (Recipe, "accept: {confidence: 99}", "accept.confidence: 99 should be less than 1; write 0.99"),
    (Recipe, "distill: {tokens: 1e6}", "distill.tokens: '1e6' should be a valid integer, unable to parse string as "
     "an integer; write 1000000"),
    # texts that YAML reads as something else
    (Recipe, "engine: {tensorrt_llm: 1.2}", "engine.tensorrt_llm: 1.2 is not how YAML reads a text without quotes; "
     "write '1.2'"),
    (Recipe, "name: 2026-01-01", "name: datetime.date(2026, 1, 1) is not how YAML reads a text without quotes; "
     "write '2026-01-01'"),
    (Profile, "stage: {cpu: 4}", "stage.cpu: 4 is not how YAML reads a text without quotes; write '4'"),
    # the same key twice, and what is no document
    (Recipe, "quantize: {format: fp8}\nname: a\nquantize: {format: nvfp4}",
     "the recipe is not valid: 'quantize' stands twice, on lines 1 and 3; remove one of them"),
    (Evaluation, '{"items": [1, 2, 3], "items": [4, 5, 6]}', "the evaluation is not valid: 'items' stands twice"),
    (Profile, "stages: {distill: {cpu: '1'}, distill: {cpu: '2'}}", "'distill' stands twice, on lines 1 and 1"),
    (Rollout, "{service: a, service: b}", "'service' stands twice"),
    (Recipe, "# nothing yet\n", "the recipe is empty; write its fields"),
    (Recipe, "name: 2026-13-01", "the recipe is not valid YAML or JSON: month must be in 1..12"),
    (Recipe, "[" * 5000, "the recipe is not valid YAML or JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "source", "message"), MESSAGES, ids=[source[:60] for _, source, _ in MESSAGES])
def test_messages(kind, source, message):
    with pytest.raises(InputError) as caught:
        kind.parse(source)
    assert message in str(caught.value)


def test_a_workload_of_its_own_has_each_key_once():
    with pytest.raises(InputError, match="the workload is not valid: 'concurrency' stands twice, on lines 1 and 2"):
        workload.parse("concurrency: 2\nconcurrency: 3")


def test_keys_that_yaml_merges_may_be_overridden():
    text = "{name: a, prune: &p {method: depth, blocks: 2}}"
    assert Recipe.parse(text.replace("&p {", "{<<: {blocks: 1}, ")).prune.blocks == 2


SECTIONS = [
    {"method": "depth", "blocks": 2},
    {"method": "width", "ffn": 0.5},
    {"method": "wanda", "sparsity": 0.5},
    {"method": "movement", "sparsity": 0.5},
]
GOOD = [
    *(
        (Recipe, {
            "name": "a", "calibrate": {"text": [{"text": "a.txt", "weight": 1.0}], "samples": 4}, "prune": prune,
            "distill": {"tokens": 1000, "text": ["builtin"]}, "quantize": {"format": "int8_wo", "exclude": ["lm_head"]},
            "engine": {"backend": "trtllm", "tensorrt_llm": "1.2.1"}, "accept": {"min_recovery": 0.95},
        })
        for prune in SECTIONS
    ),
    (Recipe, {"workload": {"input": {"mean": 1.0, "p95": 1, "max": 1}, "concurrency": 4, "total": 9000}}),
    (Recipe, {"workload": {"recorded": "x", "days": 1.0, "drift": 2.0}}),
    (Evaluation, {"tasks": ["a"], "items": [1, 2, 3], "windows": [1, 2, 3], "confirm_items": 5, "heldout": "a.txt"}),
    (Profile, {
        "gpu": {"resource": "a", "tolerations": [{"key": "a"}]}, "images": {"cuda": "i:1", "pull_secrets": ["a"]},
        "environment": {"A": "b"}, "cache": {"claim": "a", "path": "/c"}, "shared_memory": "1Gi",
        "stage": {"cpu": "1", "timeout_hours": 1.0, "retries": 1},
    }),
    (Rollout, yaml.safe_load(ROLLOUT) | {"canary_percent": 5, "max_disagreement": 0.5}),
]  # fmt: skip
WRONG = [
    5, 1.2, 95, 0.01, -1, 10**6, True, None, "", "x", "95%", "1e6", "fp8", "FP8", "trtllm", "TRTLLM", "depth", "depht",
    "Depth", "int8", "TRUE", "a.txt", "[5]", "*.x", [], [5], [1, 2, 3, 4], {}, {"x": 1},
]  # fmt: skip


def places(value: Any, at: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [place for key, part in inner for place in places(part, (*at, key))]


def put(document: dict, place: tuple, value: Any) -> dict:
    changed = copy.deepcopy(document)
    holder = changed
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return changed


def without(document: dict, place: tuple) -> dict:
    changed = copy.deepcopy(document)
    holder = changed
    for key in place[:-1]:
        holder = holder[key]
    del holder[place[-1]]
    return changed


def said(kind: Any, document: dict) -> str:
    """The message about a document in which one thing is wrong, "" where none is or several are."""
    try:
        kind.model_validate(document)
    except ValidationError as error:
        return explain(kind, document, error.errors()[0]) if error.error_count() == 1 else ""
    return ""


def remedies(message: str, where: str) -> list[Any]:
    """The values that a message about one field says to write; none where it describes them in words."""
    told = re.fullmatch(rf"{re.escape(where)}: .*; write (?:such as )?(.+?)(?: \(valid: .*\))?", message, re.DOTALL)
    if not told or told[1][0] not in "'[{-0123456789":
        return []
    first = re.match(r"'[^']*'", told[1]) or re.match(r"(.+?)(?:, or .*| or more)?$", told[1])
    return [yaml.safe_load(first[first.lastindex or 0])]


@pytest.mark.parametrize(("kind", "good"), GOOD, ids=[f"{kind.__name__} {list(good)}"[:60] for kind, good in GOOD])
def test_what_a_message_says_to_write_is_accepted(kind, good):
    assert said(kind, good) == ""
    tried = 0
    for place in places(good):
        for value in WRONG:
            message = said(kind, put(good, place, value))
            where = ".".join(map(str, place))
            for remedy in remedies(message, where):
                tried += 1
                again = said(kind, put(good, place, remedy))
                assert not again.startswith(f"{where}:"), f"{value!r} -> {message} -> {again}"
    assert tried >= 10


@pytest.mark.parametrize(("kind", "good"), GOOD, ids=[f"{kind.__name__} {list(good)}"[:60] for kind, good in GOOD])
def test_what_a_message_says_to_remove_may_be_absent(kind, good):
    for place in places(good):
        message = said(kind, put(good, place, None))
        if "is empty; remove it" in message:
            again = said(kind, without(good, place))
            assert not again.startswith(".".join(map(str, place))), f"{message} -> {again}"


# --- the nearest of a list ---------------------------------------------------------------------------------------

NEAREST = [
    ("INT8_WO", Format.__args__, "int8_wo"),
    ("fp8-per-channel", Format.__args__, "fp8_per_channel"),
    ("int4_qptq", Format.__args__, "int4_gptq"),
    ("Lower Latency", GOALS, "lower_latency"),
    (48, (32, 64, 128), 64),
    (100, (32, 64, 128), 128),
    ("*.down_project", ["*.down_proj", "*.up_proj"], "*.down_proj"),
    ("nothing alike", ["fp8"], None),
    ("", ["fp8"], None),
]


@pytest.mark.parametrize(("value", "valid", "expected"), NEAREST)
def test_nearest(value, valid, expected):
    told = nearest(value, valid)
    assert told.startswith(f"write {expected!r} (" if expected else "valid: ")


#: What `nvidia-smi -L`, a node's label nvidia.com/gpu.product, or a data sheet calls a device.
DEVICES = [
    ("H100-SXM", ["h100"]), ("NVIDIA H100 80GB HBM3", ["h100"]), ("NVIDIA-H100-80GB-HBM3", ["h100"]),
    ("NVIDIA A100-SXM4-80GB", ["a100-80"]), ("A100-PCIE-40GB", ["a100-40"]), ("A100", ["a100-40", "a100-80"]),
    ("A100-SXM", ["a100-40", "a100-80"]), ("NVIDIA GeForce RTX 4090", ["rtx4090"]), ("NVIDIA L40S", ["l40s"]),
    ("NVIDIA L4", ["l4"]), ("H200 NVL", ["h200"]), ("CPU", ["cpu"]), ("h1000", ["h100"]),
    ("v100", []), ("Tesla T4", []), ("A10", []), ("gpu", []), ("", []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), DEVICES)
def test_a_device_by_another_name(name, expected):
    with pytest.raises(InputError) as caught:
        target(name)
    told = re.findall(r"'([^']*)'", str(caught.value).partition("; ")[2])
    assert told == expected and all(target(found) for found in told)
    assert expected or str(caught.value).endswith(f"valid: {', '.join(TARGETS)}")
