"""One attempt by the functions that its tasks call: its verdict, and its confirmation on fresh items."""

from __future__ import annotations

import json
import math

import pytest

from trimtab.loop import evidence
from trimtab.store import Tree

from .filed import EVALUATION, GOOD, LOOPING, LUCKY, OPEN, USELESS, Scores, attempts, first_attempt, told

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("scores", "ending", "reason"),
    [
        (GOOD, "accepted confirmed", "is at least 0.95 and perplexity ratio"),
        (OPEN, "accepted confirmed after 2 looks", "is at least 0.95 and perplexity ratio"),
        (LUCKY, "rejected accuracy", "not confirmed on fresh items"),
        (USELESS, "rejected no_gain", "accurate but useless for fit_larger_model: +0.0% fewer bytes"),
        (Scores(ratio=1.4), "rejected perplexity", "is above the limit 1.1"),
        (Scores(ratio=math.inf), "rejected degenerate_output", "the candidate's log-likelihood is not finite"),
        (LOOPING, "rejected degenerate_output", "75% of the continuations are empty or repeat themselves"),
    ],
    ids=["good", "open", "lucky", "useless", "perplexity", "not finite", "looping"],
)
def test_verdict(scores, ending, reason, script):
    state = first_attempt(script, scores)
    assert told(state) == [f"int4_rtn {ending}"]
    assert reason in state.history[-1].verdict.reason
    assert (state.history[-1].evaluation is not None) == ending.startswith("accepted")


def test_another_attempt_is_confirmed_on_other_items(script):
    """Otherwise the items that refused the first would steer what is tried next, and judge that too."""
    script.file({script.ladder[0].quantize.format: LUCKY}, recipes=script.ladder[:2])
    state = attempts(script, script.begin(max_attempts=2), 2)
    assert told(state) == ["int4_rtn rejected accuracy", "int4_gptq accepted confirmed"]
    measured = evidence.read(script.store, state.history[-1].evaluation)["measured"]
    lines = (script.store.get(Tree.model_validate(measured["look-4"])) / "items.jsonl").read_text().splitlines()
    numbers = [int(json.loads(line)["id"].removeprefix("item/")) for line in lines]
    assert (min(numbers), len(numbers)) == (sum(EVALUATION.items) + EVALUATION.confirm_items, EVALUATION.confirm_items)
