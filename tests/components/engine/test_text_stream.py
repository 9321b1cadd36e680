"""Text comes in whole characters, and no part of a stop string is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.components.engine.server.text_stream import TextStream
from trimtab.runtime.checkpoint.model_files import load_tokenizer

TEXTS = ["The river runs.", "naïve café – 東京 🚤🚤 ok", "\ta\n\n  b", "🚤"]


def stream(served: Path, text: str, stops: list[str]) -> tuple[list[str], bool]:
    tokenizer = load_tokenizer(served)
    made = TextStream(tokenizer, stops)
    parts = []
    for token in tokenizer(text).input_ids:
        parts.append(made.push(token))
        if made.stopped:
            break
    return [*parts, made.finish()], made.stopped


@pytest.mark.parametrize("text", TEXTS)
def test_parts_make_the_text(served: Path, text: str) -> None:
    parts, stopped = stream(served, text, [])
    assert "".join(parts) == text and not stopped
    assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["runs"], "The river "),
        (["ver", "river"], "The "),
        (["ns.x"], "The river runs."),  # begins, but does not come
        (["The"], ""),
        (["."], "The river runs"),
        (["", "er r"], "The riv"),
    ],
)
def test_stops(served: Path, stops: list[str], expected: str) -> None:
    parts, stopped = stream(served, "The river runs.", stops)
    assert "".join(parts) == expected and stopped == (expected != "The river runs.")


def test_a_character_that_stays_broken_is_told_at_the_end(served: Path) -> None:
    tokenizer = load_tokenizer(served)
    made = TextStream(tokenizer)
    tokens = tokenizer("a🚤").input_ids[:-1]
    assert "".join([*map(made.push, tokens), made.finish()]) == tokenizer.decode(tokens)
