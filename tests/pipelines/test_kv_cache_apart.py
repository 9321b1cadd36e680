"""A quantized KV cache is judged apart from the weights: what it alone lost is no word against them."""

from __future__ import annotations

import pytest

from trimtab import stages
from trimtab.base.errors import Failure
from trimtab.stages import looks as validation

from .filed import BAD, GOOD, LOOPING, LUCKY, OPEN, UNDECIDED, USELESS, Scores, attempts, told

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("scores", "apart", "ending", "reason"),
    [
        (BAD, GOOD, "rejected kv_cache_accuracy", "perplexity ratio 1.020 (1.019 to 1.021) in 16 bits, which is"),
        (Scores(ratio=1.4), GOOD, "rejected kv_cache_accuracy", "the KV cache is to blame: perplexity ratio 1.4"),
        (UNDECIDED, GOOD, "rejected kv_cache_accuracy after 3 looks", "in nvfp4 2000 items are too few to tell"),
        (LUCKY, GOOD, "rejected kv_cache_accuracy", "in nvfp4 not confirmed on fresh items"),
        (BAD, BAD, "rejected accuracy", "the KV cache is not to blame: in 16 bits recovery 0.4"),
        (Scores(ratio=1.4), Scores(ratio=1.3), "rejected perplexity", "the KV cache is not to blame: in 16 bits perpl"),
        (LUCKY, LUCKY, "rejected accuracy", "the KV cache is not to blame: in 16 bits not confirmed on fresh items"),
        (BAD, OPEN, "rejected accuracy", "not shown to be to blame: in 16 bits 400 items are too few to tell: rec"),
        # no failure that the KV cache can be told to have caused in this way: nothing more is measured
        (GOOD, None, "accepted confirmed", "is at least 0.95 and perplexity ratio"),
        (USELESS, None, "rejected no_gain", "accurate but useless"),
        (LOOPING, None, "rejected degenerate_output", "are empty or repeat themselves"),
    ],
    ids=[
        "accuracy", "perplexity", "undecided", "unconfirmed", "weights: accuracy", "weights: perplexity",
        "weights: unconfirmed", "too few items", "accepted", "useless", "degenerate",
    ],
)  # fmt: skip
def test_a_kv_cache_is_judged_apart(scores, apart, ending, reason, kv_script):
    kv_script.file({"int4_rtn + nvfp4 KV": scores}, kv_cache_apart=apart, recipes=kv_script.ladder[:1])
    state = attempts(kv_script, kv_script.begin(), 1)
    assert told(state) == [f"int4_rtn {ending}"]
    assert reason in state.history[-1].verdict.reason


def test_without_a_quantized_kv_cache_there_is_nothing_to_blame(kv_script):
    kv_script.file({"int4_rtn + nvfp4 KV": BAD, "int4_rtn": BAD}, kv_cache_apart=BAD)
    first, second = attempts(kv_script, kv_script.begin(2), 2).history
    assert "KV cache" in first.verdict.reason and "KV cache" not in second.verdict.reason
    assert second.recipe.quantize.kv_cache == "none"


def test_what_cannot_be_judged_apart_keeps_its_verdict(kv_script, monkeypatch):
    kv_script.file({"int4_rtn + nvfp4 KV": BAD}, recipes=kv_script.ladder[:1])
    cached = stages.cached

    def killed(store, stage, parameters, *others):
        if parameters.get("kv_cache") == "none" and stage is validation.EVALUATE:
            raise Failure("does_not_fit", "evaluate was killed")
        return cached(store, stage, parameters, *others)

    monkeypatch.setattr(stages, "cached", killed)
    verdict = attempts(kv_script, kv_script.begin(), 1).history[-1].verdict
    assert (verdict.outcome, verdict.failure_class) == ("rejected", "accuracy")
    assert verdict.reason.endswith("; the KV cache could not be judged apart: evaluate was killed")
