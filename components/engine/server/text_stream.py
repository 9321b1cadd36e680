"""Turns tokens into text as they come: no half characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

#: What a tokenizer writes for bytes that are no character, or not one yet.
_BROKEN = "\ufffd"


class TextStream:
    """The text of one answer.

    Args:
        stops: strings of which the first to appear ends the text; it is not part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._tokens: list[int] = []
        # Text up to `_read` is out; it is decoded again from `_start`, as a token's text depends on those before it.
        self._start = self._read = 0
        self._held = ""
        #: Whether a stop string has appeared.
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes a token and returns the text that is certain by it."""
        self._tokens.append(token)
        before, after = self._decode(self._read), self._decode(None)
        if after.endswith(_BROKEN) or len(after) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._tokens)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """Returns the text that was held back, when no more tokens come."""
        rest = self._decode(None)[len(self._decode(self._read)) :]
        text = self._release(rest)
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _decode(self, stop: int | None) -> str:
        return self._tokenizer.decode(self._tokens[self._start : stop], skip_special_tokens=True)

    def _release(self, text: str) -> str:
        """Holds back what may be the beginning of a stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        ends = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        begins = next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)), 0
        )
        self._held = text[len(text) - begins :]
        return text[: len(text) - begins]
