"""A service beside its release: what counts as alike, and what as a drift."""

from __future__ import annotations

import pytest

from trimtab.base.errors import InputError
from trimtab.release.watch import Answer, Expected, Tolerance, alike, exposition, is_refusal, observe

WANTED = Expected("my-model/000003", {"a": "one two three", "b": "I'm sorry, no.", "c": "ten", "d": "four"}, 50.0)


def answers(seconds: float = 1.0, **texts: str | None) -> dict[str, Answer]:
    said = {**WANTED.answers, **texts}
    return {prompt: Answer(text, 32 if text is not None else 0, seconds) for prompt, text in said.items()}


@pytest.mark.parametrize(
    ("first", "second", "share"),
    [("one two", "one two", 1), (" one two\n", "one two", 1), ("one two", "one six", 4 / 7), ("one", "", 0),
     ("", "", 1), ("ab", "abcd", 0.5)],
)  # fmt: skip
def test_texts_are_alike_as_far_as_they_begin_alike(first, second, share):
    assert alike(first, second) == pytest.approx(share)


def test_the_same_service():
    seen = observe(WANTED, answers(), Tolerance())
    assert (seen.agreement, seen.identical, seen.refused, seen.refused_before, seen.drifts) == (1, 1, 0.25, 0.25, ())
    assert seen.slowdown == pytest.approx(50 / 32)  # 32 tokens a second instead of 50


@pytest.mark.parametrize(
    ("found", "drift"),
    [
        (answers(a="six", b="no", c="x"), "25% of the texts begins alike, less than 50%"),
        (answers(seconds=2.0), "it answers 3.1 times as slowly, more than 3"),
        (answers(a=None), "1 of 4 prompts got no answer"),
        (answers(c="I cannot help with that.", d="Sorry, no."), "it refuses 75% of the prompts, and the release 25%"),
    ],
)
def test_each_way_to_drift(found, drift):
    assert drift in observe(WANTED, found, Tolerance()).drifts


def test_tokens_that_nobody_counted_say_nothing_of_speed():
    found = {prompt: Answer(text, 0, 9.0) for prompt, text in WANTED.answers.items()}
    seen = observe(WANTED, found, Tolerance())
    assert seen.slowdown == 0 and not seen.drifts


def test_refusals():
    assert is_refusal("  I’m sorry, but I can't") and is_refusal("As an AI, I") and not is_refusal("Sharpen it.")


def test_what_prometheus_reads():
    text = exposition(WANTED, observe(WANTED, answers(a=None), Tolerance()), 1_700_000_000.5)
    assert 'trimtab_release_agreement{release="my-model",version="000003"} 0.75\n' in text
    assert 'trimtab_release_drift{release="my-model",version="000003"} 1\n' in text
    assert 'trimtab_release_watched_timestamp_seconds{release="my-model",version="000003"} 1700000000\n' in text
    parser = pytest.importorskip("prometheus_client.parser")
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert families["trimtab_release_unanswered"].samples[0].value == 1
    assert all(family.type == "gauge" and family.documentation for family in families.values()) and len(families) == 8


@pytest.mark.parametrize(
    "bad", [{"agreement": 1.2}, {"slowdown": 0.5}, {"refusals": -0.1}, {"agreement": float("nan")}]
)
def test_tolerances_that_mean_nothing(bad):
    with pytest.raises(InputError, match=f"{next(iter(bad))}: .* is not valid; write"):
        Tolerance(**bad)
