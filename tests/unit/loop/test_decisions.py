"""The decisions between the stages, on a store without weights."""

from __future__ import annotations

import pytest

from trimtab.base.errors import InputError
from trimtab.components.fetch.source import fetch
from trimtab.judge import Verdict
from trimtab.loop import decisions
from trimtab.loop.documents import load, read_plan, save
from trimtab.loop.state import Brief, State
from trimtab.recipe import Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.store import open_store

BASELINE = Verdict(outcome="baseline", reason="the model unchanged")
ACCEPTED = Verdict(outcome="accepted", reason="good")
LIMITS = "accept: {min_recovery: 0.9}"
OWN = "{quantize: {format: int8_wo}, accept: {min_recovery: 0.9}, calibrate: {samples: 3}}"


def rejected(cause: str = "accuracy") -> Verdict:
    return Verdict(outcome="rejected", failure_class=cause, reason="bad")


@pytest.fixture
def begin(tmp_path, write_model):
    """A function: begins a run on a model of zeros."""
    store = open_store(str(tmp_path / "store"))
    tree = fetch(str(write_model(tmp_path / "model")), store)

    def call(recipe: str = "", goal: str = "fit_larger_model", target: str = "cpu", attempts: int = 5) -> State:
        return decisions.begin(
            model=tree, store_uri=store.uri, name="tiny", goal=goal, target=target, recipe=recipe,
            max_attempts=attempts, evaluation=Evaluation(),
        )  # fmt: skip

    return call


def rungs(state: State) -> list[Recipe]:
    return [rung.recipe for rung in read_plan(open_store(state.store), state.plan).ladder]


def after(state: State, *verdicts: Verdict, baseline: Verdict | None = BASELINE) -> State:
    """The state after attempts that ended so, each with the recipe that the loop chose."""
    state = state.model_copy(update={"baseline": baseline and Brief(recipe=state.recipe, verdict=baseline)})
    for verdict in verdicts:
        state = decisions.next_attempt(state)
        brief = Brief(recipe=state.recipe, why=state.why, verdict=verdict)
        state = state.model_copy(update={"history": (*state.history, brief), "verdict": verdict})
    return state


def test_begin_measures_the_model_unchanged(begin):
    state = begin()
    assert state.attempt == 0 and not (state.recipe.prune or state.recipe.distill or state.recipe.quantize)
    assert state.recipe.engine == rungs(state)[0].engine
    assert state.why == "the model unchanged, in 16 bits on one cpu, at most 8 x 256 tokens"


@pytest.mark.parametrize(
    ("recipe", "own_first"),
    [("", False), (LIMITS, False), (OWN, True), ("engine: {max_batch_size: 2}", False)],
    ids=["no recipe", "limits alone are no attempt", "a recipe of one's own", "an engine alone is no attempt"],
)
def test_the_ladder(begin, recipe, own_first):
    state, wanted = begin(recipe), Recipe.parse(recipe or "{}")
    ladder = rungs(state)
    assert (ladder[0] == wanted) == own_first
    assert all(rung.accept == wanted.accept and rung.calibrate == wanted.calibrate for rung in ladder)
    assert len({rung.digest for rung in ladder}) == len(ladder)


@pytest.mark.parametrize("recipe", ["", "engine: {backend: torch}", "engine: {tensorrt_llm: 1.1.0}"])
def test_a_back_end_alone_holds_for_the_ladder(begin, recipe):
    """Without one it is what the target serves with."""
    wanted = Recipe.parse(recipe).engine.backend if recipe else "trtllm"
    assert {rung.engine.backend for rung in rungs(begin(recipe, target="h100"))} == {wanted}


@pytest.mark.parametrize("recipe", ["", "quantize: {format: int8_wo}\n", "accept: {min_recovery: 0.9}\n"])
def test_a_workload_sizes_every_engine(begin, recipe):
    """It is no part of the recipes themselves, which travel in the state."""
    length = "{mean: 20, p95: 40, max: 60}"
    state = begin(f"{recipe}workload: {{input: {length}, output: {length}, concurrency: 3, total: 100}}")
    sizes = [(r.engine.max_batch_size, r.engine.max_seq_len, r.engine.kv_cache_tokens) for r in rungs(state)]
    assert set(sizes) == {(3, 256, 256)}, "the context is the model's, for what is measured before a release"
    assert not any(recipe.workload for recipe in rungs(state))
    assert state.recipe.engine == rungs(state)[0].engine, "the baseline is served alike"
    made_of = read_plan(open_store(state.store), state.plan).materials
    assert made_of["workload"]["total"] == 100 and made_of["traffic"] is None and "workload" not in made_of["recipe"]


def test_what_fetching_converted_is_among_the_materials(tmp_path, write_model):
    store = open_store(str(tmp_path / "store"))
    plain = fetch(str(write_model(tmp_path / "model")), store)
    said = "the source is FP8 with block scales of 128 x 128; it is dequantised to BF16"
    metadata = {**store.manifest(plain).metadata, "converted": [said]}
    for tree, expected in ((plain, []), (store.put(tmp_path / "model", kind="checkpoint", metadata=metadata), [said])):
        state = decisions.begin(
            model=tree, store_uri=store.uri, name="tiny", goal="fit_larger_model", target="cpu", recipe="",
            max_attempts=5, evaluation=Evaluation(),
        )  # fmt: skip
        assert read_plan(store, state.plan).materials["converted"] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "workload: {total: 4096}"}, "workload: total is 4,096 tokens, and the model reads 256"),
        ({"recipe": "workload: {recorded: /nowhere.jsonl}"}, "recorded: '/nowhere.jsonl' is no log"),
        ({"goal": "lower_latencies"}, "goal: 'lower_latencies' is not valid; write 'lower_latency'"),
        ({"target": "a100"}, "target: 'a100' is not known; write 'a100-40' or 'a100-80'"),
        ({"recipe": "quantize: {format: fp9}"}, "quantize.format: 'fp9' is not valid"),
        ({"recipe": "quantize: {format: fp8}", "target": "a100-40"}, "fp8 needs compute capability 8.9"),
        ({"recipe": "quantize: {format: int4_awq, group_size: 128}"}, "128 does not divide the 64 input features"),
        ({"recipe": "prune: {method: depth, blocks: 4}"}, "4 of 4 blocks cannot be removed; write at most 3"),
        ({"recipe": "{quantize: {format: int8_wo}, engine: {backend: trtllm}}"}, "'trtllm' does not run on cpu"),
    ],
)
def test_begin_refuses(begin, arguments, message):
    with pytest.raises(InputError) as caught:
        begin(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("verdicts", "baseline", "attempts", "answer"),
    [
        ([], None, 5, "stop"),  # nothing was measured
        ([], rejected("export_damaged"), 5, "stop"),
        ([], BASELINE, 5, "retry"),
        ([ACCEPTED], BASELINE, 5, "stop"),
        ([rejected()], BASELINE, 5, "retry"),
        ([rejected()], BASELINE, 1, "stop"),
        ([rejected(), rejected()], BASELINE, 2, "stop"),
        ([rejected(), ACCEPTED], BASELINE, 5, "stop"),
        ([rejected("no_gain")], BASELINE, 5, "stop"),  # the first rung has the fewest bits: nothing gains more
    ],
)
def test_decide(begin, verdicts, baseline, attempts, answer):
    assert decisions.decide(after(begin(attempts=attempts), *verdicts, baseline=baseline)) == answer


def test_next_attempt_starts_clean(begin):
    state = after(begin(), rejected())
    following = decisions.next_attempt(state)
    assert following.attempt == 2 and following.recipe != state.recipe
    assert (following.verdict, following.trees, following.seconds) == (None, {}, {})
    assert following.history == state.history and following.baseline == state.baseline
    assert following.why.startswith(f"{state.recipe.title} failed (accuracy): next is {following.recipe.title}")


@pytest.mark.parametrize("baseline", [None, rejected("export_damaged")])
def test_no_attempt_without_a_baseline(begin, baseline):
    state = after(begin(), baseline=baseline)
    assert decisions.next_attempt(state) is state


def test_a_ladder_that_is_used_up_ends_the_run(begin):
    state = begin(attempts=10)
    state = after(state)
    while decisions.decide(state) == "retry":
        state = after(state, rejected("unsupported"))
    assert len(state.history) <= 10
    assert len({brief.recipe.digest for brief in state.history}) == len(state.history)


@pytest.mark.parametrize(
    ("recipe", "attempt", "failure_class", "reason"),
    [
        ("quantize: {format: int8_wo}", 1, None, ""),
        ("quantize: {format: fp8, kv_cache: nvfp4}", 1, None, ""),  # judged by emulation
        ("quantize: {format: int4_awq, group_size: 128}", 1, "unsupported", "does not divide"),
        ("engine: {max_batch_size: 1000000000}", 1, "does_not_fit", "does not fit"),
        ("engine: {max_batch_size: 1000000000}", 0, None, ""),  # the baseline was placed when the run was planned
    ],
)
def test_prepare(begin, recipe, attempt, failure_class, reason):
    state = begin().model_copy(update={"recipe": Recipe.parse(recipe), "attempt": attempt})
    verdict = decisions.prepare(state).verdict
    assert (verdict.failure_class if verdict else None) == failure_class
    assert reason in (verdict.reason if verdict else "")


def test_prepare_passes_a_verdict_on(begin):
    unfit = Recipe.parse("engine: {max_batch_size: 1000000000}")
    state = begin().model_copy(update={"verdict": rejected(), "recipe": unfit})
    assert decisions.prepare(state) is state


def test_long_reasons_are_kept(begin, monkeypatch):
    state = after(begin(), rejected())
    _next = decisions._next
    monkeypatch.setattr(decisions, "_next", lambda state: (_next(state)[0], "word " * 1000))
    assert load(save(decisions.next_attempt(state))).why == "word " * 1000
