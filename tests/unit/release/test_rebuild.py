"""What a rebuild does after each kind of change, on a store without weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from releases import file_release

from trimtab import stages
from trimtab.base import environment, signing
from trimtab.base.errors import Damaged, InputError
from trimtab.components.fetch.source import fetch
from trimtab.judge import Verdict
from trimtab.loop import decisions
from trimtab.loop.documents import read_plan, write_plan
from trimtab.loop.state import Brief
from trimtab.planning import placement
from trimtab.recipe import Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.release import rebuild, statement
from trimtab.store import Store, Tree

DISTILLED = """
prune: {method: depth, blocks: 1}
distill: {tokens: 1024, text: lessons.txt}
quantize: {format: int8_wo}
calibrate: {text: calibration.txt}
"""


@pytest.fixture
def run(store: Store, tmp_path: Path, write_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """A function: what a run is asked for, with its two text files and a model beside it."""
    monkeypatch.chdir(tmp_path)
    Path("lessons.txt").write_text("a lesson")
    Path("calibration.txt").write_text("some text")
    model = fetch(str(write_model(tmp_path / "model")), store)

    def wanted(recipe: str = DISTILLED, **changes: Any) -> dict[str, Any]:
        asked = {"model": model, "store_uri": store.uri, "name": "tiny", "goal": "lower_latency", "target": "cpu"}
        asked |= {"recipe": recipe, "max_attempts": 5, "evaluation": Evaluation(), "images": "registry/trimtab:1"}
        return {**asked, **changes}

    return wanted


def released(store: Store, asked: dict[str, Any], **changes: Any) -> tuple[str, Tree]:
    """Releases what a run made that was asked for this; returns the release and its student."""
    state = decisions.begin(**asked)
    student, export = (store.put_json(kind, {"of": state.model.digest}) for kind in ("checkpoint", "export"))
    recipe = Recipe.parse(asked["recipe"] or "quantize: {format: int8_wo}")
    trees = {"checkpoint": student} if recipe.distill else {}
    state = state.model_copy(update={"recipe": recipe, "trees": trees, **changes})
    return file_release(store, state, export), student


@pytest.fixture
def another_model(store: Store, tmp_path: Path, write_model: Callable[..., Path]) -> Callable[..., Tree]:
    """A function: a new version of the model, its weights no longer zeros; or one of another shape."""

    def make(tokenizer: str = "{}", **shape: int) -> Tree:
        folder = write_model(tmp_path / "new", **shape)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-2] + b"\x01\x00")
        (folder / "tokenizer.json").write_text(tokenizer)
        return fetch(str(folder), store)

    return make


def test_nothing_changed(store, run):
    uri, _ = released(store, run())
    found, _ = rebuild.plan(**run())
    assert (found.outcome, found.first, found.release) == ("keep", None, uri)
    assert found.markdown.startswith(f"# Nothing changed: {uri} stands\n")


def test_the_first_release(run):
    found, state = rebuild.plan(**run())
    assert (found.outcome, found.reasons) == ("rebuild", ("there is no release 'tiny' yet",))
    assert state.attempt == 0 and state.model == run()["model"]


CHANGES = {  # what changes, and what the review says of it
    "goal": ({"goal": "lower_cost"}, "goal: lower_latency → lower_cost"),
    "recipe": ({"recipe": DISTILLED.replace("1024", "2048")}, "recipe.distill.tokens: 1024 → 2048"),
    "image": ({"images": "registry/trimtab:2"}, "images: registry/trimtab:1 → registry/trimtab:2"),
    "attempts": ({"max_attempts": 2}, "max_attempts: 5 → 2"),
    "evaluation": ({"evaluation": Evaluation(confirm_items=90)}, "evaluation.confirm_items: 960 → 90"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_begins_anew(name, store, run):
    changes, reason = CHANGES[name]
    released(store, run())
    found, state = rebuild.plan(**run(**changes))
    assert (found.outcome, found.reasons, found.first) == ("rebuild", (reason,), None)
    assert decisions.next_attempt(state.model_copy(update={"baseline": BASELINE})).trees == {}


def test_new_calibration_text_alone_begins_anew(store, run):
    """What is measured for quantization changes; the student has nothing new to learn."""
    released(store, run())
    Path("calibration.txt").write_text("other text")
    found, _ = rebuild.plan(**run())
    assert found.outcome == "rebuild" and found.first is None
    assert [reason.partition(":")[0] for reason in found.reasons] == ["calibration_data.calibration.txt"]


@pytest.mark.parametrize("change", ["lessons", "model", "both, and the libraries"])
def test_goes_on_from_the_student(change, store, run, another_model, monkeypatch):
    _, student = released(store, run())
    asked = run() if change == "lessons" else run(model=another_model())
    if change != "model":
        Path("lessons.txt").write_text("a new lesson")
    if "libraries" in change:
        monkeypatch.setattr(environment, "versions", lambda: {"torch": "3.0"})
    found, state = rebuild.plan(**asked)
    assert found.outcome == "rebuild" and found.first.student == student
    assert "goes on from the student" in found.markdown
    begun = decisions.next_attempt(state.model_copy(update={"baseline": BASELINE}))
    assert begun.recipe == Recipe.parse(DISTILLED), "the released recipe is tried first"
    assert begun.trees == {"checkpoint": student}
    inputs = stages.inputs_of(stages.STAGES["distill"], begun)
    assert (inputs["checkpoint"], inputs["model"]) == (student, asked["model"])


SERVED = "{prune: {method: depth, blocks: 1}, quantize: {format: int8_wo}, workload: {recorded: traffic.jsonl}}"


def record(requests: int = 2000, output: int = 20, seconds: int = 1) -> None:
    """Records a request each second, and how many seconds it takes, which is how many there are at a time."""
    line = '{{"time": {}, "input_tokens": 100, "output_tokens": {}, "seconds": {}}}\n'
    Path("traffic.jsonl").write_text("".join(line.format(second, output, seconds) for second in range(requests)))


def test_the_same_traffic_in_another_week(store, run):
    record()
    uri, _ = released(store, run(SERVED))
    assert statement_of(store, uri)["materials"]["traffic"]["requests"] == 2000, "the shape is kept in the release"
    record(3000, output=29)
    found, _ = rebuild.plan(**run(SERVED))
    same = "the recorded traffic is the same to within 1.5 times: output p95: 20 → 29 tokens, 1.45 times"
    assert (found.outcome, found.reasons[1:]) == ("keep", (same,)) and same in found.markdown


def test_traffic_that_drifted(store, run):
    """The released recipe is tried first, for what is asked now; the stages before its engine are found by key."""
    record()
    _, state = rebuild.plan(**run(SERVED))
    sized = decisions.next_attempt(state.model_copy(update={"baseline": BASELINE}))
    assert (sized.recipe.engine.max_batch_size, sized.recipe.engine.max_seq_len) == (1, 256)
    released(store, run(SERVED), recipe=sized.recipe)
    record(output=40, seconds=3)
    found, state = rebuild.plan(**run(SERVED))
    moved = [f"traffic: output {quantile}: 20 → 40 tokens, 2.00 times, more than 1.5" for quantile in ("p50", "p95")]
    assert (found.outcome, list(found.reasons)) == ("rebuild", moved)
    assert "First is the recipe of the last release, sized anew." in found.markdown
    begun = decisions.next_attempt(state.model_copy(update={"baseline": BASELINE}))
    assert begun.recipe.engine.max_batch_size == 3 and begun.trees == {}
    for stage in ("prune", "quantize"):
        parameters = [stages.STAGES[stage].parameters(recipe) for recipe in (sized.recipe, begun.recipe)]
        assert parameters[0] == parameters[1]


def test_a_released_recipe_that_does_not_fit_any_more(store, run, monkeypatch, capsys):
    """The rest of the ladder is tried without it."""
    record()
    better = Recipe.parse(DISTILLED.replace("blocks: 1", "blocks: 2"))
    released(store, run(SERVED), recipe=better)
    record(output=40)
    plan_engine = placement.plan_engine

    def refuses(facts: Any, recipe: Recipe, *others: Any) -> Any:
        if recipe.prune == better.prune:
            raise InputError("target: not one request fits")
        return plan_engine(facts, recipe, *others)

    monkeypatch.setattr(placement, "plan_engine", refuses)
    _, state = rebuild.plan(**run(SERVED))
    assert "the recipe of the last release is not tried: target: not one request fits" in capsys.readouterr().err
    ladder = [rung.recipe for rung in read_plan(store, state.plan).ladder]
    assert ladder[0].prune == Recipe.parse(SERVED).prune and better.prune not in [recipe.prune for recipe in ladder]


def test_how_far_traffic_may_drift_is_said_by_the_run(store, run):
    record()
    released(store, run(SERVED))
    record(output=40)
    assert rebuild.plan(**run(SERVED.replace("jsonl", "jsonl, drift: 2.5")))[0].outcome == "keep"


def test_traffic_is_recorded_for_the_first_time_or_no_more(store, run):
    stated = SERVED.replace("recorded: traffic.jsonl", "concurrency: 1, input: {mean: 9, p95: 9, max: 9}, total: 120")
    stated = stated.replace("total", "output: {mean: 9, p95: 9, max: 99}, total")
    released(store, run(stated))
    record()
    reasons = rebuild.plan(**run(SERVED))[0].reasons
    assert reasons[0].startswith("workload: {") and reasons[1].startswith("traffic: none → 2,000 requests in")
    released(store, run(SERVED))
    changed = stated.replace("120", "119")
    assert [reason.partition(":")[0] for reason in rebuild.plan(**run(changed))[0].reasons] == ["workload", "traffic"]
    found, _ = rebuild.plan(**run(stated.partition(", workload")[0] + "}"))
    assert found.reasons[0].endswith("→ none") and found.first is None, "its engine was sized for what is no more"
    released(store, run(stated))
    assert rebuild.plan(**run(changed))[0].reasons == ("workload.total: 120 → 119",)


def test_new_lessons_and_new_traffic_go_on_from_the_student(store, run):
    recipe = DISTILLED + "workload: {recorded: traffic.jsonl}"
    record()
    _, student = released(store, run(recipe))
    Path("lessons.txt").write_text("a new lesson")
    record(output=40, seconds=3)
    _, state = rebuild.plan(**run(recipe))
    begun = decisions.next_attempt(state.model_copy(update={"baseline": BASELINE}))
    assert begun.trees == {"checkpoint": student} and begun.recipe.engine.max_batch_size == 3


def statement_of(store: Store, uri: str) -> dict[str, Any]:
    return statement.read(signing.unseal(store.read_release(uri)["attestation"])).predicate.evidence


BASELINE = Brief(recipe=Recipe(), verdict=Verdict(outcome="baseline", reason="the model unchanged"))
OTHERS = {
    "another shape": {"layers": 2},
    "another tokenizer": {"tokenizer": '{"added_tokens": []}'},
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_student_of_a_model_that_is_not_alike(name, store, run, another_model):
    released(store, run())
    found, _ = rebuild.plan(**run(model=another_model(**OTHERS[name])))
    assert (found.outcome, found.first) == ("rebuild", None)


@pytest.mark.parametrize(
    "recipe",
    [
        "{quantize: {format: int8_wo}, calibrate: {text: lessons.txt}}",
        "{prune: {method: movement, sparsity: 0.5}, distill: {tokens: 1024, text: lessons.txt}}",
    ],
)
def test_no_student_where_there_is_none_to_go_on_from(recipe, store, run, another_model):
    released(store, run(recipe))
    found, _ = rebuild.plan(**run(recipe, model=another_model()))
    assert (found.outcome, found.first) == ("rebuild", None)


def test_a_released_recipe_of_the_ladder_stands_before_the_users_own(store, run):
    """The user's recipe failed where the release was made; with new lessons it is tried again, second."""
    better = Recipe.parse(DISTILLED.replace("blocks: 1", "blocks: 2"))
    _, student = released(store, run(), recipe=better)
    Path("lessons.txt").write_text("a new lesson")
    _, state = rebuild.plan(**run())
    ladder = [rung.recipe for rung in read_plan(store, state.plan).ladder]
    assert ladder[:2] == [better, Recipe.parse(DISTILLED)]
    assert len({recipe.digest for recipe in ladder}) == len(ladder) <= 10
    state = decisions.next_attempt(state.model_copy(update={"baseline": BASELINE}))
    assert (state.recipe, state.trees) == (better, {"checkpoint": student})
    failed = Verdict(outcome="rejected", failure_class="accuracy", reason="bad")
    state = state.model_copy(update={"history": (Brief(recipe=better, verdict=failed),)})
    assert decisions.next_attempt(state).trees == {}, "what comes next is pruned otherwise, or not at all"


def test_stages_that_the_student_stands_for_are_not_run(store, run, monkeypatch):
    _, student = released(store, run())
    Path("lessons.txt").write_text("a new lesson")
    _, state = rebuild.plan(**run())
    state = decisions.next_attempt(state.model_copy(update={"baseline": BASELINE}))
    ran = []

    def cached(_store: Store, stage: stages.Stage, *_: Any) -> stages.Result:
        ran.append(stage.name)
        return stages.Result(student, {}, 0.0, hit=True)

    monkeypatch.setattr(stages.execution, "cached", cached)
    for name in stages.STAGES:
        state, _ = stages.advance(name, state)
    assert ran == ["distill", "quantize", "engine"]


def test_a_release_without_a_statement(store, run):
    store.release("tiny", {"recipe": {}})
    found, _ = rebuild.plan(**run())
    assert found.outcome == "rebuild" and "it carries no statement" in found.reasons[0]


def test_a_release_of_before(store, run):
    """An older trimtab did not write down what a release is made of, a newer one may write more."""
    released(store, run(), plan=None)
    assert "it does not say what it was made of" in rebuild.plan(**run())[0].reasons[0]
    begun = decisions.begin(**run())
    strange = read_plan(store, begun.plan).model_copy(update={"materials": {"moon": "full"}})
    released(store, run(), plan=write_plan(store, strange))
    assert "another version of trimtab wrote" in rebuild.plan(**run())[0].reasons[0]


def test_a_statement_that_has_expired(store, run, monkeypatch):
    released(store, run())
    late = datetime.now(UTC) + timedelta(days=400)
    monkeypatch.setattr(rebuild, "datetime", type("Clock", (), {"now": staticmethod(lambda _zone: late)}))
    found, _ = rebuild.plan(**run())
    assert found.outcome == "rebuild" and "expired on" in found.reasons[0]


def test_a_release_whose_artifact_is_gone(store, run):
    uri, _ = released(store, run())
    digest = store.read_release(uri)["artifact"]["digest"]
    (Path(store.uri.removeprefix("file://")) / "trees" / f"{digest}.json").unlink()
    found, _ = rebuild.plan(**run())
    assert found.outcome == "rebuild" and "there is no tree" in found.reasons[0]


def test_a_damaged_record_is_told_at_once(store, run):
    uri, _ = released(store, run())
    path = Path(store.uri.removeprefix("file://")) / f"releases/tiny/{uri.rpartition('/')[2]}.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    with pytest.raises(Damaged, match="is damaged"):
        rebuild.plan(**run())
