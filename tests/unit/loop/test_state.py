"""Where a run stands: what travels between tasks is an address, and what it leads to survives the trip."""

from __future__ import annotations

import math

import pytest
from facts import LLAMA_8B

from trimtab.base.errors import InputError
from trimtab.catalog.goals import DEFAULT_GOAL, GOALS
from trimtab.judge import Confirmation, Measurements, Verdict
from trimtab.judge.statistics import Interval
from trimtab.loop import decisions
from trimtab.loop.adjust import next_recipe
from trimtab.loop.documents import load, read_attempt, save
from trimtab.loop.state import Brief, State
from trimtab.model.hardware import TARGETS, target
from trimtab.plan.matrix import ladder
from trimtab.recipe import Acceptance, Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.stages import STAGES
from trimtab.store import Tree

STORE = "s3://ml-platform-artifacts/teams/compression/trimtab"
TREE = Tree(uri=f"{STORE}/trees/{'a' * 64}", digest="a" * 64, bytes=16_060_522_240)
INTERVAL = Interval(estimate=0.9512345678901234, low=0.9312345678901234, high=0.9712345678901234)
MEASURED = Measurements(
    bytes=9_060_522_240,
    quantized_share=0.5103,
    decode_tokens_per_second=123.45,
    throughput_tokens_per_second=12345.67,
    peak_memory_bytes=12_345_678_901,
    max_context_tokens=1_234_567,
)
NUMBERS = {
    "looks": 3,
    "items": 2000,
    "windows": 48,
    "accuracy": INTERVAL,
    "recovery": INTERVAL,
    "perplexity": 12.345678901234567,
    "perplexity_ratio": INTERVAL,
    "mcnemar_p": 0.00012345678901234567,
    "measurements": MEASURED,
}
REJECTED = Verdict(
    outcome="rejected",
    failure_class="accuracy",
    reason="recovery 0.912 (0.890 to 0.934) is below the limit 0.97",
    gain=0.1234567890123,
    **NUMBERS,
)
ACCEPTED = Verdict(
    outcome="accepted",
    reason="recovery 0.991 (0.975 to 1.007) is at least 0.97 and perplexity ratio 1.012 (1.009 to 1.015) at most 1.05",
    gain=0.1234567890123,
    confirmed=True,
    confirmation=Confirmation(items=960, windows=12, level=0.9, recovery=INTERVAL, perplexity_ratio=INTERVAL),
    **NUMBERS,
)
ACCEPT = Acceptance(min_recovery=0.97, max_perplexity_ratio=1.05, confidence=0.99)


def seconds(recipe) -> dict[str, float]:
    return {name: 1234.5 for name, stage in STAGES.items() if stage.wanted(recipe)} | {"validate": 1234.5}


def played(goal: str, machine: str, attempts: int) -> list[Brief]:
    """The attempts of a run in which everything but the last fails: real recipes, real sentences."""
    rungs = ladder(goal, LLAMA_8B, target(machine, 10**12 if machine == "cpu" else None), accept=ACCEPT)
    history: list[Brief] = []
    while len(history) < attempts:
        rung, why = next_recipe(rungs, history)
        if rung is None:  # this ladder has an end; what comes could be as long as what was
            history += history[: attempts - len(history)]
            break
        history.append(Brief(recipe=rung.recipe, why=why, verdict=REJECTED, seconds=seconds(rung.recipe)))
    return [*history[:-1], history[-1].model_copy(update={"verdict": ACCEPTED, "evaluation": TREE, "engine": TREE})]


def state(history: list[Brief], **fields) -> State:
    baseline = REJECTED.model_copy(update={"outcome": "baseline", "failure_class": None})
    last = history[-1]
    return State(
        store=STORE,
        name="llama-3.1-8b-instruct",
        goal="lower_latency",
        target="h100",
        model=TREE,
        attempt=len(history),
        max_attempts=10,
        recipe=last.recipe,
        why=last.why,
        trees={"checkpoint": TREE, "export": TREE, "engine": TREE},
        baseline=Brief(recipe=last.recipe, why="the model unchanged", verdict=baseline, engine=TREE),
        verdict=Verdict(outcome=last.verdict.outcome, reason=last.verdict.reason),
        history=tuple(history),
        **fields,
    )


@pytest.fixture
def run(store, tmp_path):
    """A function: a run after so many attempts of a ladder, all but the last in vain, in a store of its own."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    model = store.put(folder, kind="checkpoint", metadata={"facts": LLAMA_8B.model_dump(mode="json")})

    def played_in_store(goal: str, machine: str, attempts: int, **fields) -> State:
        there = state(played(goal, machine, attempts), **fields)
        return there.model_copy(update={"store": store.uri, "model": model, "plan": None})

    return played_in_store


#: Longer than any place in Kubeflow Pipelines takes kindly, several times the 16 kB that a whole run once had.
LONG = "not one token of it is finite; " * 3000


@pytest.mark.parametrize("machine", TARGETS)
@pytest.mark.parametrize("goal", GOALS)
def test_what_travels_is_an_address(goal, machine, run):
    """However long the sentences, the recipes' lists and the texts, and however many attempts there were."""
    mix = [{"text": f"/data/{n}/" + "x" * 400 + ".jsonl", "weight": n} for n in range(1, 30)]
    exclude = [f"model.layers.{n}.mlp.down_proj" for n in range(200)]
    recipe = Recipe.parse({"calibrate": {"text": mix}, "quantize": {"format": "fp8", "exclude": exclude}})
    there = run(goal, machine, 10)
    failed = REJECTED.model_copy(update={"reason": LONG})
    history = [brief.model_copy(update={"recipe": recipe, "verdict": failed, "why": LONG}) for brief in there.history]
    there = there.model_copy(update={"history": tuple(history), "recipe": recipe, "why": LONG, "verdict": failed})
    uri = save(there)
    assert len(uri) == len(there.store) + len("/trees/") + 64
    back = load(uri)
    assert (back.history, back.baseline, back.recipe, back.why) == (there.history, there.baseline, recipe, LONG)


def test_no_document_grows_with_the_number_of_attempts(run, store):
    sizes = []
    for attempts in range(1, 11):
        there = run("lower_latency", "h100", 10)
        one = there.history[0]
        there = there.model_copy(update={"history": (one,) * attempts, "attempt": attempts})
        sizes.append(store.manifest(save(there)).size)
    assert max(sizes) - min(sizes) <= 1, "the number of the attempt may have two digits"


def test_survives_the_trip(run):
    there = run("lower_latency", "h100", 3)
    back = load(save(there))
    assert back.history == there.history and back.baseline == there.baseline
    assert back.history[-1].verdict.confirmed and back.history[-1].evaluation == TREE
    assert (back.attempt, back.trees, back.goal, back.target, back.model) == (
        3, there.trees, there.goal, there.target, there.model,
    )  # fmt: skip
    assert load(save(back)) == back


def test_what_is_over_is_written_once(run, store):
    """An attempt that begins names the one before it, which stays as it was filed."""
    over = load(save(run("lower_latency", "h100", 3)))
    begun = over.model_copy(update={"attempt": 4, "trees": {}, "verdict": None, "recipe": Recipe(), "seconds": {}})
    uri = save(begun)
    assert load(uri).filed == over.filed
    assert read_attempt(store, uri).parent == over.filed[-1]
    assert read_attempt(store, over.filed[0]).parent is None
    worked = load(uri).model_copy(update={"trees": {"export": TREE}})
    again = load(save(worked))
    assert (again.filed, again.trees, again.is_over) == (over.filed, {"export": TREE}, False)


def test_what_is_saved_is_what_the_state_says(run):
    """Also where it says otherwise than the documents that it was read from, of which nothing is lost."""
    over = load(save(run("lower_latency", "h100", 3)))
    first = over.history[0].model_copy(update={"why": "another reason"})
    changed = over.model_copy(update={"history": (first, *over.history[1:])})
    back = load(save(changed))
    assert [brief.why for brief in back.history] == [brief.why for brief in changed.history]
    assert back.filed[0] == over.filed[0] and not set(back.filed[1:]) & set(over.filed)
    elsewhere = over.model_copy(update={"target": "l4"})
    assert load(save(elsewhere)).target == "l4" and load(save(over)).target == "h100"


def test_a_run_whose_baseline_failed_goes_nowhere(run):
    there = run("lower_latency", "h100", 1)
    failed = Brief(recipe=Recipe(), verdict=REJECTED)
    there = there.model_copy(update={"baseline": failed, "history": (), "attempt": 0, "verdict": REJECTED})
    uri = save(there)
    assert load(uri).is_over and save(load(uri)) == uri


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("{}", "state: '{}' is not valid; write the URI of an attempt"),
        ("model", "is no attempt but a checkpoint; write what a task of the run returned"),
    ],
)
def test_what_is_no_attempt(what, message, run):
    there = run("lower_latency", "h100", 1)
    with pytest.raises(InputError) as caught:
        load(there.model.uri if what == "model" else what)
    assert message in str(caught.value)


def test_an_end_without_bound_survives_the_trip(run):
    open_ended = Interval(estimate=1.1, low=0.0, high=math.inf)
    verdict = REJECTED.model_copy(update={"perplexity_ratio": open_ended})
    there = run("lower_latency", "h100", 1).model_copy(update={"history": (Brief(recipe={}, verdict=verdict),)})
    assert load(save(there)).history[0].verdict.perplexity_ratio == open_ended


def test_a_ladder_of_long_exclusions_is_tried_to_its_end(run):
    """What ended once with an error at the fourth attempt: a recipe that names each layer that it leaves alone."""
    there = run("lower_latency", "h100", 1)
    exclude = [f"model.layers.{n}.{name}" for n in range(16) for name in ("mlp.down_proj", "self_attn.o_proj")]
    recipe = {"prune": {"method": "depth", "blocks": 16}, "distill": {"tokens": 1_000_000}}
    recipe |= {"quantize": {"format": "fp8", "kv_cache": "fp8", "exclude": exclude}, "engine": {"backend": "trtllm"}}
    now = decisions.begin(
        model=there.model, store_uri=there.store, name="m", goal="lower_latency", target="h200",
        recipe=Recipe.parse(recipe).to_json(), max_attempts=10, evaluation=Evaluation(),
    )  # fmt: skip
    measured = Verdict(outcome="baseline", reason="the model unchanged", measurements=MEASURED)
    now = now.model_copy(update={"baseline": Brief(recipe=now.recipe, verdict=measured)})
    while decisions.decide(now) == "retry":
        now = load(save(decisions.next_attempt(now)))
        brief = Brief(recipe=now.recipe, why=now.why, verdict=REJECTED, seconds={"quantize": 10.0})
        now = load(save(now.model_copy(update={"history": (*now.history, brief), "verdict": REJECTED})))
    assert len(now.history) > 3 and len({brief.recipe.digest for brief in now.history}) == len(now.history)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{item: 5}", "item: unknown key 'item'; write 'items'"),
        ("{tasks: piqa}", "tasks: 'piqa' is not a list; write [piqa]"),
        ("{items: [10, 10]}", "items: [10, 10] has 2 entries and 3 are needed; write such as [400, 600, 1000]"),
        ("{items: [-1, 0, 0]}", "items.0: -1 should be greater than or equal to 0"),
        ("{confirm_windows: -1}", "confirm_windows: -1 should be greater than or equal to 0"),
        ("{window_tokens: 8}", "window_tokens: 8 should be greater than or equal to 16"),
    ],
)
def test_bad_evaluation(source, message):
    with pytest.raises(InputError) as caught:
        Evaluation.parse(source)
    assert message in str(caught.value)


@pytest.mark.parametrize("attempts", [0, 11])
def test_attempts_have_a_limit(attempts):
    with pytest.raises(InputError, match=f"max_attempts: {attempts} should be"):
        State.parse({"store": STORE, "goal": DEFAULT_GOAL, "target": "cpu", "model": TREE, "max_attempts": attempts})


@pytest.mark.parametrize("value", [1.315496, 0.8954996, 0.99949999, 12.3455001, 0.000123456789, math.inf, -3.0])
def test_a_filed_number_is_written_as_it_was_in_the_sentence(value: float) -> None:
    """1.315496 is 1.315; rounded to five digits first it would be 1.3155, and then 1.316."""
    verdict = ACCEPTED.model_copy(update={"perplexity_ratio": Interval(estimate=value, low=value, high=value)})
    brief = Brief(recipe=Recipe(), verdict=verdict)
    filed = Brief.model_validate_json(brief.model_dump_json()).verdict.perplexity_ratio
    assert [f"{filed.estimate:.{n}f}" for n in range(5)] == [f"{value:.{n}f}" for n in range(5)]
