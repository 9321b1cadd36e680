"""What can go wrong, and the exit code that each kind of trouble has on the command line.

| code | meaning |
|---|---|
| 0 | released |
| 1 | a defect in trimtab: please report it |
| 2 | bad input: a field, a file, an address or a credential must be changed |
| 3 | no recipe passed: the run is complete and explained, nothing was released |
| 4 | a stage failed: infrastructure trouble (disk, network, store), worth running again |
| 5 | a release does not verify: the message says what was altered, by which key it is not signed, or when it expired |
| 6 | a service is not its release any more: `watch-release` says how far it has drifted |
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_WORD = re.compile(r"[a-z0-9]+")


class TrimtabError(Exception):
    """Any error that trimtab raises on purpose; its message says what to do."""

    exit_code = 1


class InputError(TrimtabError):
    """What the user gave cannot be used. The message names the field, the value and what to write instead."""

    exit_code = 2


class NotReleased(TrimtabError):
    """The run is complete, and no recipe passed: the gate released nothing."""

    exit_code = 3


class StageError(TrimtabError):
    """A stage could not do its work for a reason that lies outside the recipe."""

    exit_code = 4


class Transient(StageError):
    """Trouble that another try may not meet: a lost connection, a server that is busy, a GPU that was taken away."""


class StoreError(StageError):
    """The store could not be read or written; nothing partial is visible in it."""


class Unreachable(StoreError, Transient):
    """The store gave no answer, or one that another try may change: the only trouble of it that is waited for."""


class Damaged(StoreError):
    """An object of the store is missing, or is not what its checksum says: no other try will change that."""


class NotVerified(TrimtabError):
    """A release is not what was judged and signed, or cannot be shown to be; the message says why."""

    exit_code = 5


class Drifted(TrimtabError):
    """A deployed service does not answer as its release did when it was judged; the message says in what."""

    exit_code = 6


class Failure(TrimtabError):
    """An expected failure of an attempt: data for the verdict, not trouble of the infrastructure.

    Args:
        failure_class: one of `trimtab.judge.FAILURE_CLASSES`.
        reason: one sentence that a person understands.
    """

    def __init__(self, failure_class: str, reason: str):
        super().__init__(reason)
        self.failure_class = failure_class
        self.reason = reason


def nearest(value: object, valid: Iterable[object], listed: Iterable[str] | None = None) -> str:
    """Returns "write 'fp8' (valid: …)", for a message about a value that is not in `valid`.

    Of numbers, the nearest is that of the least distance. Of names it is one that differs in its case and its
    separators alone ("INT8_WO"), else the longest whose words begin the value ("H100-SXM5-80GB" is an "h100"), else
    the most similar.

    Args:
        listed: what stands for all of `valid` in the message, where these are too many.
    """
    values = list(valid)
    close = _closest(value, values)
    listed = ", ".join(map(str, values) if listed is None else listed)
    return f"write {written(close)} (valid: {listed})" if close is not None else f"valid: {listed}"


def written(value: object) -> str:
    """Returns a name or a number as it is written into YAML: a text in quotes, which YAML reads as nothing else."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def _closest(value: object, valid: list[object]) -> object | None:
    numbers = [number for number in valid if isinstance(number, int | float)]
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return min(numbers, key=lambda number: (abs(number - value), -number))
    by_words = {tuple(_WORD.findall(str(name).casefold())): name for name in valid}
    words = _WORD.findall(str(value).casefold())
    for known, name in by_words.items():
        if words and "".join(known) == "".join(words):
            return name
    if begun := [known for known in by_words if known and _begins(list(known), words)]:
        return by_words[max(begun, key=lambda known: len("".join(known)))]
    by_text = {str(name).casefold(): name for name in valid}
    close = difflib.get_close_matches(str(value).casefold(), by_text, n=1, cutoff=0.5)
    return by_text[close[0]] if close else None


def _begins(known: list[str], words: list[str]) -> bool:
    """Whether the first words are the same, and the others of `known` follow; "80gb" counts as "80"."""
    rest = iter(words)
    first = next(rest, "")
    return _is_word(known[0], first) and all(any(_is_word(word, other) for other in rest) for word in known[1:])


def _is_word(known: str, word: str) -> bool:
    unit = word.removeprefix(known)
    return word == known or (known[-1:].isdigit() and unit != word and unit.isalpha())
