"""Which items and windows a look asks, which answer of an item counts, and what counts as degenerate."""

from __future__ import annotations

import random
from types import SimpleNamespace

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.base.errors import InputError
from trimtab.components.validation.evaluation import measure, pace
from trimtab.components.validation.evaluation.generation import is_degenerate
from trimtab.components.validation.evaluation.load import Load
from trimtab.components.validation.evaluation.tasks import choose, filters_of, load
from trimtab.planning import dealing
from trimtab.recipe import Acceptance
from trimtab.recipe.evaluation import Evaluation
from trimtab.runtime.text.token_windows import read_text
from trimtab.stages import looks


@pytest.mark.parametrize(
    ("tokens", "degenerate"),
    [
        ([], True),
        ([1], False),
        ([1, 1, 1, 1], False),  # too short to tell
        ([1] * 32, True),
        ([1, 2] * 16, True),
        ([1, 2, 3, 4, 5, 6, 7] * 5, True),  # seven pairs of 34
        (list(range(32)), False),
        ([*range(16), *range(16)], False),  # one repetition is no loop
        (random.Random(0).choices(range(100), k=32), False),
    ],
)
def test_is_degenerate(tokens, degenerate):
    assert is_degenerate(tokens) == degenerate


def tasks(**sizes: int) -> dict[str, SimpleNamespace]:
    return {name: SimpleNamespace(eval_docs=range(size)) for name, size in sizes.items()}


def pairs(chosen: dict[str, list[int]]) -> set[tuple[str, int]]:
    return {(name, document) for name, documents in chosen.items() for document in documents}


@given(st.integers(1, 40), st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_spans_never_overlap_and_leave_nothing_out(size, steps):
    start, seen = 0, set()
    for step in steps:
        stop = min(size, start + step)
        found = pairs(choose(tasks(a=size), {"a": [start, stop]}))
        assert not found & seen and len(found) == stop - start
        seen |= found
        start = stop


def test_a_prefix_is_a_random_sample_and_always_the_same():
    chosen = choose(tasks(a=1000), {"a": [0, 100]})["a"]
    assert chosen == choose(tasks(a=1000, b=3), {"a": [0, 100]})["a"]
    assert max(chosen) > 900 and 400 < sum(chosen) / 100 < 600


def test_a_task_that_has_shrunk_since_the_run_was_planned():
    with pytest.raises(InputError, match="tasks: 'a' has 9 items, and had 10 or more when the run was planned; begin"):
        choose(tasks(a=9), {"a": [5, 10]})


def test_a_template_is_compiled_once_and_filled_with_each_document(monkeypatch):
    _, found = load(["trimtab_geography"], "")
    task, compiled = found["trimtab_geography"], []
    compile = jinja2.Environment.compile
    monkeypatch.setattr(jinja2.Environment, "compile", lambda *a, **k: compiled.append(a[1]) or compile(*a, **k))
    documents = list(task.eval_docs)[:20]
    words = [measure._words(task, document) for document in documents]
    assert all(document["context"] in text for document, text in zip(documents, words, strict=True))
    assert len(set(words)) == len(words) and len(compiled) == len(set(compiled))


def filtered(**filters: tuple[str, ...]) -> dict[str, SimpleNamespace]:
    return {task: SimpleNamespace(_filters=[SimpleNamespace(name=n) for n in names]) for task, names in filters.items()}


GSM8K = filtered(gsm8k=("strict-match", "flexible-extract"), piqa=("none",))


@pytest.mark.parametrize(
    ("named", "chosen"), [({}, "strict-match"), ({"gsm8k": "flexible-extract"}, "flexible-extract")]
)
def test_an_item_is_one_answer_by_a_stated_filter(named, chosen):
    assert filters_of(GSM8K, named) == {"gsm8k": chosen, "piqa": "none"}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"gsm8k": "loose"}, "filters: 'gsm8k' has no filter 'loose'; write strict-match or flexible-extract"),
        ({"gsm": "strict-match"}, "filters: there is no task 'gsm' among gsm8k, piqa; remove it"),
    ],
)
def test_a_filter_that_is_not_there_is_refused(named, message):
    with pytest.raises(InputError, match=message):
        filters_of(GSM8K, named)


def test_looks_and_fresh_windows_follow_each_other():
    settings = Evaluation(windows=(4, 0, 6), confirm_windows=5)
    deal = dealing.deal({"a": 2000}, settings, Acceptance(), 5)
    drawn = [*looks.looks(settings, deal), looks.fresh(settings, deal, 0)]
    assert [windows for _, windows in drawn] == [[0, 4], [4, 4], [4, 10], [10, 15]]
    assert [items for items, _ in drawn] == [deal.look(1), deal.look(2), deal.look(3), deal.confirm(0)]
    assert looks.fresh(settings, deal, 1) == (deal.confirm(1), [10, 15])


def test_a_kv_cache_in_16_bits_is_another_evaluation():
    parameters = (Evaluation(), {"a": [0, 9]}, [0, 1], True)
    own, without = (
        looks.evaluation_parameters(*parameters, max_length=64, kv_cache=kv) for kv in ("export", "none")
    )
    assert own == looks.evaluation_parameters(*parameters, max_length=64)
    assert without == {**own, "kv_cache": "none"}
    assert looks.EVALUATE.key(own, {}, {}) != looks.EVALUATE.key(without, {}, {})


PARAMETERS = {"tasks": ["trimtab_common_sense"], "task_path": "", "heldout": "builtin"}


def test_calibration_on_what_is_evaluated_is_refused():
    words = read_text("builtin", measure.HELDOUT_TEXT).split()[500:520]
    with pytest.raises(InputError, match="calibrate.text: shares 8 sequences of 13 words with the held-out text"):
        measure._refuse_overlap("before it: " + " ".join(words) + " and after", PARAMETERS)


def test_other_text_may_be_calibrated_on():
    measure._refuse_overlap("a text of its own, with nothing in it that is asked or measured anywhere", PARAMETERS)


class Clock:
    """An engine that writes so many tokens a second, of all sequences together, and counts what it was asked for."""

    def __init__(self, speed: float, device_bytes: int = 0):
        self.speed, self.device_bytes, self.asked = speed, device_bytes, []

    def decode_speed(self, batch_size: int, prompt_tokens: int, new_tokens: int, repeats: int) -> list[float]:
        self.asked.append((batch_size, prompt_tokens, new_tokens, repeats))
        return [self.speed] * repeats

    @property
    def seconds(self) -> float:
        return sum(batch * tokens * (repeats + 1) / self.speed for batch, _, tokens, repeats in self.asked)


#: What a CPU's engine is asked for whose recipe has batches of 8.
LOAD = Load(8, 32, 48)


@pytest.mark.parametrize(
    ("speed", "tokens"), [(1e6, (48, 48)), (100.0, (48, 18)), (10.0, (15, 8)), (1.0, (8, 8))]
)
def test_slow_decoding_is_measured_on_fewer_tokens(speed, tokens):
    """6 s for four repeats: of 100 tokens a second, eight sequences have 18 each; fewer than 8 are no measurement."""
    assert measure.new_tokens([(Clock(speed), LOAD)]) == tokens


def test_all_engines_that_are_compared_write_as_much():
    quick, slow = (Clock(1e6), LOAD), (Clock(40.0), Load(4, 32, 48))
    assert measure.new_tokens([quick, slow]) == measure.new_tokens([slow]) == (48, 15)


def test_rounds_share_the_time():
    engine = Clock(20.0)
    tokens = measure.new_tokens([(engine, LOAD)], rounds=3)
    for _ in range(3):
        measure.decode_speed(engine, LOAD, tokens)
    # Three times batch 1 in 6 s; 8 tokens at batch 8 take longer; a trial of each is 8 tokens, twice.
    assert tokens == (10, 8) and engine.asked[-1] == (8, 32, 8, 3)
    assert engine.seconds == pytest.approx(3 * (10 * 4 + 8 * 8 * 4) / 20 + 2 * (8 + 64) / 20)


def test_a_gpu_is_not_tried():
    """A trial would record a CUDA graph of its own."""
    engine = Clock(1.0, device_bytes=1 << 30)
    assert measure.new_tokens([(engine, LOAD)]) == (48, 48) and engine.asked == []
    assert pace.new_tokens(engine, 1, 32, 48, 3) == 48
