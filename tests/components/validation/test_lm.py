"""The adapter against lm-eval's own HFLM, on a tiny model whose tokenizer writes BOS and on one whose does not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from trimtab.base.errors import InputError
from trimtab.components.validation.evaluation.lm import EngineLM
from trimtab.recipe import Engine
from trimtab.runtime.engines.torch_engine import TorchEngine

LONG = " ".join(tiny.SENTENCES * 4)
PAIRS = [
    ("The river runs past", " the old mill."),
    ("The river runs past ", "the old mill."),  # the blank goes to the answer
    ("The river runs past", " the"),
    ("A boat", " carries apples to the market."),
    ("<s>A boat", " carries"),  # as a chat template begins; BOS is not written twice
    ("", "She reads a letter."),
    ("", "<s>She reads a letter."),
    ("", "The rain stops."),
]
GENERATIONS = [
    {"until": ["\n\n"], "max_gen_toks": 12},
    {"until": "e", "max_gen_toks": 40},  # a text is one stop, not its letters
    {"until": ["the", "."], "max_gen_toks": 40, "do_sample": False, "temperature": 0.0},
    {"max_gen_toks": 8},
    {"max_new_tokens": 5},
    {"max_tokens": 6, "until": []},
    {"max_gen_toks": 4, "max_new_tokens": 9},
    {"until": ["zzz"]},  # 256 tokens
]


class Both:
    """The engine and HFLM, which runs the engine's own network: greedy texts of two networks part at a near-tie.

    For the same reason a batch of the engine is one prompt.
    """

    def __init__(self, folder: Path):
        self.engine = TorchEngine(folder, Engine(max_seq_len=1024, max_batch_size=1), device="cpu")
        self.theirs = HFLM(pretrained=self.engine.model, tokenizer=self.engine.tokenizer, batch_size=1)

    def ours(self, max_length: int = 1024, batch: int = 3) -> EngineLM:
        return EngineLM(self.engine, max_length, batch)


@pytest.fixture(scope="module", params=[True, False], ids=["bos", "no-bos"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return Both(tiny.write_model(folder, adds_bos=request.param))


def likelihoods(lm: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return lm.loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)])


def generations(lm: Any, asked: list[tuple[str, dict[str, Any]]]) -> list[str]:
    # HFLM adds the end of text to the caller's own list of stops.
    asked = copy.deepcopy(asked)
    return lm.generate_until([Instance("generate_until", {}, pair, n) for n, pair in enumerate(asked)])


def check_close(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    """Both compute in bfloat16, in another order: 8 bits of mantissa, a log-probability of some 100 nats."""
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=0.01, abs=0.05)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_texts_are_the_same_tokens(both):
    ours = both.ours()
    texts = ["The river", "<s>The river", "", " ", LONG]
    assert [ours.tok_encode(text) for text in texts] == [both.theirs.tok_encode(text) for text in texts]
    plain = [both.theirs.tok_encode(text, add_special_tokens=False) for text in texts]
    assert [ours.tok_encode(text, add_special_tokens=False) for text in texts] == plain
    assert ours.prefix_token_id == both.theirs.prefix_token_id == both.engine.tokenizer.bos_token_id


def test_answers_to_choose_from(both):
    check_close(likelihoods(both.ours(), PAIRS), likelihoods(both.theirs, PAIRS))


def test_what_the_engine_is_asked_are_hflm_s_tokens(both, monkeypatch):
    """Numbers may agree by chance; what is asked may not."""
    asked: dict[str, list[Any]] = {}
    monkeypatch.setattr(both.engine, "loglikelihood", lambda requests: asked.setdefault("ours", requests))
    theirs = lambda requests, **_: asked.setdefault("theirs", [r[1:] for r in requests])  # noqa: E731
    monkeypatch.setattr(both.theirs, "_loglikelihood_tokens", theirs)
    likelihoods(both.ours(), PAIRS)
    likelihoods(both.theirs, PAIRS)
    assert asked["ours"] == asked["theirs"]


def test_what_is_too_long_loses_its_beginning(both, monkeypatch):
    pairs = [(LONG, " the old mill."), ("The river", " runs"), (LONG[:200], " and " + LONG[200:230])]
    ours = both.ours(max_length=64)
    monkeypatch.setattr(both.theirs, "_max_length", 63)  # it does not count the last token of the answer
    check_close(likelihoods(ours, pairs), likelihoods(both.theirs, pairs))
    assert ours.truncated == 2


def test_an_answer_that_alone_is_too_long_is_refused(both):
    with pytest.raises(InputError, match=r"engine.max_seq_len: an answer to choose has \d+ tokens.* instead of 16"):
        likelihoods(both.ours(max_length=16), [("The", f" {LONG}")])


@pytest.mark.parametrize("options", GENERATIONS, ids=str)
def test_generation(both, options):
    asked = [("The river runs", options), ("A boat carries apples", options)]
    assert generations(both.ours(), asked) == generations(both.theirs, asked)


def test_answers_are_not_written_far_behind_their_stops(tmp_path, monkeypatch):
    """Both in one batch, and each cut as it would be with all its 256 tokens."""
    engine = TorchEngine(tiny.write_model(tmp_path / "model"), Engine(max_seq_len=1024, max_batch_size=2), device="cpu")
    written: list[list[int]] = []
    generate = engine.generate

    def counted(*asked: Any) -> list[list[int]]:
        written[:] = generate(*asked)
        return written

    monkeypatch.setattr(engine, "generate", counted)
    lm = EngineLM(engine, max_length=1024, batch=2)
    prompts = ["The river runs", "A boat carries apples"]
    whole = generations(lm, [(prompt, {"until": []}) for prompt in prompts])
    most = max(map(len, written))
    stops = [text[20] for text in whole]
    found = generations(lm, [(prompt, {"until": [stop]}) for prompt, stop in zip(prompts, stops, strict=True)])
    assert found == [text[: text.index(stop)] for text, stop in zip(whole, stops, strict=True)]
    assert max(map(len, written)) < most / 2


def test_prompts_that_are_too_long_lose_their_beginning(both, monkeypatch):
    asked = [(LONG, {"max_gen_toks": 16, "until": ["."]}), ("A boat", {"max_gen_toks": 16, "until": ["."]})]
    ours = both.ours(max_length=64)
    monkeypatch.setattr(both.theirs, "_max_length", 64)
    assert generations(ours, asked) == generations(both.theirs, asked)
    assert ours.truncated == 1


def test_answers_come_back_in_the_order_of_the_requests(both, monkeypatch):
    """In batches of like length, and of the same number of new tokens: each request must get its own answer."""
    calls: list[tuple[int, int]] = []

    def echo(prompts: list[list[int]], most: int, until: Any) -> list[list[int]]:
        calls.append((len(prompts), most))
        return [prompt[-most:] for prompt in prompts]

    monkeypatch.setattr(both.engine, "generate", echo)
    words = LONG.split()
    asked = [(" ".join(words[: 1 + n % 7]), {"max_gen_toks": 3 + n % 2, "until": ["\n"]}) for n in range(20)]
    found = generations(both.ours(batch=2), asked)
    decode = both.engine.tokenizer.decode
    wanted = [decode(both.theirs.tok_encode(c)[-o["max_gen_toks"] :], skip_special_tokens=True) for c, o in asked]
    assert found == wanted
    assert sorted(calls) == [(2, 3), (2, 4), (8, 3), (8, 4)], "four batches of two at once"


def test_an_empty_prompt_begins_with_bos(both, monkeypatch):
    asked: list[list[int]] = []
    monkeypatch.setattr(both.engine, "generate", lambda prompts, *_: asked.extend(prompts) or prompts)
    generations(both.ours(), [("", {"max_gen_toks": 4})])
    assert asked == [[both.engine.tokenizer.bos_token_id]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "tasks: a task asks for answers drawn at random"),
        ({"temperature": 0.6}, "tasks: a task asks for answers drawn at random"),
        ({"num_beams": 4}, "with num_beams: 4, which the engines do not have"),
        ({"repetition_penalty": 1.2}, "with repetition_penalty: 1.2, which the engines do not have"),
        ({"max_gen_toks": 1024}, "engine.max_seq_len: a task asks for answers of up to 1024 tokens; write more than"),
    ],
)
def test_an_answer_that_would_be_another_is_refused(both, options, message):
    with pytest.raises(InputError, match=message):
        generations(both.ours(), [("The", options)])


@pytest.mark.parametrize("options", [{"top_p": 1.0, "top_k": 50}, {"num_beams": 1}])
def test_what_changes_no_likeliest_answer_is_taken(both, options):
    asked = {"max_gen_toks": 8, "until": ["."]}
    assert generations(both.ours(), [("The", {**asked, **options})]) == generations(both.ours(), [("The", asked)])
