"""The state: what flows round the loop stays small, and survives the trip."""

from __future__ import annotations

import itertools
import math

import pytest

from trimtab.adjust import next_recipe
from trimtab.errors import InputError, TrimtabError
from trimtab.hardware import TARGETS, target
from trimtab.model import Linear, ModelFacts
from trimtab.plan import ladder
from trimtab.recipe import MAX_CALIBRATION_BYTES, Acceptance, Calibration, Recipe
from trimtab.stages import STAGES
from trimtab.state import GOALS, MAX_STATE_BYTES, Brief, Evaluation, State
from trimtab.statistics import Interval
from trimtab.store import Tree
from trimtab.verdict import Confirmation, Measurements, Verdict

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


def llama_8b() -> ModelFacts:
    shapes = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096)}
    shapes |= {"self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096)}
    shapes["mlp.down_proj"] = (4096, 14336)
    linears = [Linear(f"model.layers.{n}.{name}", *shape) for n in range(32) for name, shape in shapes.items()]
    return ModelFacts(
        architecture="LlamaForCausalLM", model_type="llama", layers=32, hidden_size=4096, intermediate_size=14336,
        heads=32, kv_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=131072,
        tied_embeddings=False, parameters=8_030_261_248, bytes=16_060_522_496, dtype="bfloat16", linears=linears,
    )  # fmt: skip


def seconds(recipe) -> dict[str, float]:
    return {name: 1234.5 for name, stage in STAGES.items() if stage.wanted(recipe)} | {"validate": 1234.5}


def played(goal: str, machine: str, attempts: int) -> list[Brief]:
    """The attempts of a run in which everything but the last fails: real recipes, real sentences."""
    rungs = ladder(goal, llama_8b(), target(machine, 10**12 if machine == "cpu" else None), accept=ACCEPT)
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
        ladder=TREE,
        attempt=len(history),
        max_attempts=10,
        recipe=last.recipe,
        why=last.why,
        trees={"checkpoint": TREE, "export": TREE},
        baseline=Brief(recipe=last.recipe, why="the model unchanged", verdict=baseline, engine=TREE),
        verdict=Verdict(outcome=last.verdict.outcome, reason=last.verdict.reason),
        history=tuple(history),
        **fields,
    )


@pytest.mark.parametrize("machine", TARGETS)
@pytest.mark.parametrize("goal", GOALS)
def test_ten_full_attempts_fit(goal, machine):
    assert len(state(played(goal, machine, 10)).to_json().encode()) < MAX_STATE_BYTES


def test_ten_attempts_on_the_largest_mix_fit():
    """What all are calibrated on is written once, however it is long."""
    mix = [{"text": f"/data/{n}/" + "x" * 43 + ".jsonl", "weight": n} for n in range(1, 8)]
    calibrate = Calibration.parse({"text": mix, "samples": 12345})
    assert 0.95 * MAX_CALIBRATION_BYTES < len(calibrate.to_json()) <= MAX_CALIBRATION_BYTES
    for goal, machine in itertools.product(GOALS, TARGETS):
        there = state(played(goal, machine, 10))
        history = [
            brief.model_copy(update={"recipe": brief.recipe.model_copy(update={"calibrate": calibrate})})
            for brief in there.history
        ]
        there = there.model_copy(update={"history": tuple(history), "recipe": history[-1].recipe})
        text = there.to_json()
        assert len(text.encode()) < MAX_STATE_BYTES and text.count("jsonl") == len(mix)
        back = State.parse(text)
        assert [b.recipe for b in back.history] == [b.recipe for b in history] and back.recipe == there.recipe
        assert back.baseline.recipe == there.baseline.recipe


def test_attempts_on_different_texts_keep_their_own():
    own = Recipe.parse("calibrate: {text: a.txt}"), Recipe(), Recipe.parse("calibrate: {text: b.txt}")
    for recipe in own:
        there = state([Brief(recipe=own[0], verdict=REJECTED), Brief(recipe=recipe, verdict=REJECTED)])
        there = there.model_copy(update={"recipe": own[0]})
        assert [brief.recipe for brief in State.parse(there.to_json()).history] == [own[0], recipe]


def test_survives_the_trip():
    there = state(played("lower_latency", "h100", 3))
    back = State.parse(there.to_json())
    assert State.parse(back.to_json()) == back
    assert [brief.recipe for brief in back.history] == [brief.recipe for brief in there.history]
    assert back.history[-1].verdict.confirmed and back.model == TREE
    assert back.history[-1].verdict.recovery.low == pytest.approx(INTERVAL.low, abs=1e-5)


def test_an_end_without_bound_survives_the_trip():
    open_ended = Interval(estimate=1.1, low=0.0, high=math.inf)
    verdict = REJECTED.model_copy(update={"perplexity_ratio": open_ended})
    there = state([Brief(recipe={}, verdict=verdict)])
    assert State.parse(there.to_json()).history[0].verdict.perplexity_ratio == open_ended


def test_too_large_says_so():
    long = Brief(recipe={}, why="x" * MAX_STATE_BYTES, verdict=REJECTED)
    with pytest.raises(TrimtabError, match=r"the state has \d+ bytes, more than 16000"):
        state([long]).to_json()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{item: 5}", "item: unknown key 'item'; write 'items'"),
        ("{tasks: piqa}", "tasks: 'piqa' is not a list; write [piqa]"),
        ("{items: [10, 10]}", "items.2: is required"),
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
        State.parse({"store": STORE, "goal": GOALS[0], "target": "cpu", "model": TREE, "max_attempts": attempts})


@pytest.mark.parametrize("value", [1.315496, 0.8954996, 0.99949999, 12.3455001, 0.000123456789, math.inf, -3.0])
def test_a_filed_number_is_written_as_it_was_in_the_sentence(value: float) -> None:
    """1.315496 is 1.315; rounded to five digits first it would be 1.3155, and then 1.316."""
    verdict = ACCEPTED.model_copy(update={"perplexity_ratio": Interval(estimate=value, low=value, high=value)})
    brief = Brief(recipe=Recipe(), verdict=verdict)
    filed = Brief.model_validate_json(brief.model_dump_json()).verdict.perplexity_ratio
    assert [f"{filed.estimate:.{n}f}" for n in range(5)] == [f"{value:.{n}f}" for n in range(5)]
