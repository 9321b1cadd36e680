"""When an answer has been written far enough: what comes behind can no longer change what is read of it."""

from __future__ import annotations

import pytest
import torch

from trimtab.runtime.engines.answer_end import EVERY, AnswersEnd, has_ended


@pytest.mark.parametrize(
    ("text", "until", "ended"),
    [
        ("four.\n\nQ: and", ["\n\n"], True),
        ("four.\n\n", ["\n\n"], False),  # a tokenizer may still take back the blank before a mark
        ("four.\n\nQ: an", ["\n\n", "."], True),
        ("four.\n\nQ: an", ["", "\n\n"], True),  # an empty text stops nothing
        ("four and more of it", [""], False),
        ("four and more of it", [], False),
        ("a long way: 12345", ["12", ": 1234567890"], False),  # the longer may begin before the shorter
        ("a long way: 12345 and 17 more", ["12", ": 1234567890"], True),
    ],
)
def test_an_answer_has_ended(text, until, ended):
    assert has_ended(text, until) is ended


class Letters:
    """A tokenizer of which each token is a character."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, tokens))


def asked(rows: list[str], until: list[list[str]], ends: tuple[int, ...] = (0,)) -> list[bool]:
    """Behind prompts of two tokens."""
    tokens = torch.tensor([[1, 1, *map(ord, row)] for row in rows])
    return AnswersEnd(Letters(), 2, ends, until)(tokens, None).tolist()


def test_a_batch_ends_when_all_of_it_has_ended():
    stopped, ended, running = "a.bcdefg", "ab\0\0\0\0\0\0", "abcdefgh"
    assert EVERY == len(stopped) == len(ended) == len(running)
    assert asked([stopped, ended], [["."], ["."]]) == [True, True]
    assert asked([stopped, running], [["."], ["."]]) == [False, False]
    assert asked([stopped, stopped], [["."], ["!"]]) == [False, False]
    assert asked([stopped[:7]], [["."]]) == [False], "it looks at every eighth step"
