"""The row of items, the looks' ranges, and what counts as degenerate."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.components.validation import measure, pace, stage
from trimtab.components.validation.generation import is_degenerate
from trimtab.components.validation.tasks import choose
from trimtab.errors import InputError
from trimtab.runtime.text import read_text
from trimtab.state import Evaluation


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


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_ranges_never_overlap_and_leave_nothing_out(sizes, steps):
    row = tasks(**{f"task{n}": size for n, size in enumerate(sizes)})
    start, seen = 0, set()
    for step in steps:
        found = pairs(choose(row, start, start + step))
        assert not found & seen
        assert len(found) == max(0, min(step, sum(sizes) - start))
        seen |= found
        start += step


def test_tasks_take_turns():
    chosen = choose(tasks(a=100, b=100, c=2), 0, 30)
    assert {name: len(documents) for name, documents in chosen.items()} == {"a": 14, "b": 14, "c": 2}


def test_a_prefix_is_a_random_sample_and_always_the_same():
    chosen = choose(tasks(a=1000), 0, 100)["a"]
    assert chosen == choose(tasks(a=1000), 0, 100)["a"]
    assert max(chosen) > 900 and 400 < sum(chosen) / 100 < 600


@given(
    st.tuples(*[st.integers(0, 1000)] * 3),
    st.tuples(*[st.integers(0, 100)] * 3),
    st.integers(0, 1000),
    st.integers(0, 50),
)
def test_looks_and_fresh_items_follow_each_other(items, windows, confirm_items, confirm_windows):
    settings = Evaluation(
        items=items, windows=windows, confirm_items=confirm_items, confirm_windows=confirm_windows
    )
    drawn = [*stage.ranges(settings), stage.fresh_range(settings)]
    for kind, total in ((0, sum(items) + confirm_items), (1, sum(windows) + confirm_windows)):
        spans = [span[kind] for span in drawn]
        assert spans[0][0] == 0 and spans[-1][1] == total
        assert all(left[1] == right[0] for left, right in zip(spans, spans[1:], strict=False))


def test_a_kv_cache_in_16_bits_is_another_evaluation_and_the_exports_own_is_the_old_one():
    settings = Evaluation()
    own, without = (stage.evaluation_parameters(settings, [0, 9], [0, 1], True, kv) for kv in ("export", "none"))
    assert "kv_cache" not in own, "results from before there was a choice are found"
    assert own == stage.evaluation_parameters(settings, [0, 9], [0, 1], True)
    assert without == {**own, "kv_cache": "none"}
    assert stage.EVALUATE.key(own, {}) != stage.EVALUATE.key(without, {})


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


@pytest.mark.parametrize(
    ("speed", "tokens"),
    [(1e6, {1: 48, 8: 48}), (100.0, {1: 48, 8: 37}), (10.0, {1: 30, 8: 8}), (1.0, {1: 8, 8: 8})],
)
def test_slow_decoding_is_measured_on_fewer_tokens(speed, tokens):
    """12 s for four repeats: of 100 tokens a second, eight sequences have 37 each; fewer than 8 are no measurement."""
    assert measure.new_tokens([Clock(speed)]) == tokens


def test_all_engines_that_are_compared_write_as_much():
    quick, slow = Clock(1e6), Clock(20.0)
    assert measure.new_tokens([quick, slow]) == measure.new_tokens([slow]) == {1: 48, 8: 8}


def test_rounds_share_the_time():
    engine = Clock(20.0)
    tokens = measure.new_tokens([engine], rounds=3)
    for _ in range(3):
        measure.decode_speed(engine, tokens)
    # Three times batch 1 in 12 s; 8 tokens at batch 8 take longer; a trial of each is 8 tokens, twice.
    assert tokens == {1: 20, 8: 8} and engine.asked[-1] == (8, 32, 8, 3)
    assert engine.seconds == pytest.approx(3 * (20 * 4 + 8 * 8 * 4) / 20 + 2 * (8 + 64) / 20)


def test_a_gpu_is_not_tried():
    """A trial would record a CUDA graph of its own."""
    engine = Clock(1.0, device_bytes=1 << 30)
    assert measure.new_tokens([engine]) == {1: 48, 8: 48} and engine.asked == []
    assert pace.new_tokens([], 1, 32, 48, 3) == 48
