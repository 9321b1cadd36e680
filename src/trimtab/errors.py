"""What can go wrong, and the exit code that each kind of trouble has on the command line.

| code | meaning |
|---|---|
| 0 | released |
| 1 | a defect in trimtab: please report it |
| 2 | bad input: a field, a file, an address or a credential must be changed |
| 3 | no recipe passed: the run is complete and explained, nothing was released |
| 4 | a stage failed: infrastructure trouble (disk, network, store), worth running again |
| 5 | a release does not verify: the message says what was altered, by which key it is not signed, or when it expired |
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


class StoreError(StageError):
    """The store could not be read or written; nothing partial is visible in it."""


class Unreachable(StoreError):
    """The store gave no answer, or one that another try may change: the only trouble that is waited for."""


class Damaged(StoreError):
    """An object of the store is missing, or is not what its checksum says: no other try will change that."""


class NotVerified(TrimtabError):
    """A release is not what was judged and signed, or cannot be shown to be; the message says why."""

    exit_code = 5


class Failure(TrimtabError):
    """An expected failure of an attempt: data for the verdict, not trouble of the infrastructure.

    Args:
        failure_class: one of `trimtab.verdict.FAILURE_CLASSES`.
        reason: one sentence that a person understands.
    """

    def __init__(self, failure_class: str, reason: str):
        super().__init__(reason)
        self.failure_class = failure_class
        self.reason = reason


def nearest(value: object, valid: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """Returns "write 'fp8' (valid: …)", for a message about a value that is not in `valid`.

    Args:
        listed: what stands for all of `valid` in the message, where these are too many.
    """
    names = [str(name) for name in valid]
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    listed = ", ".join(names if listed is None else listed)
    return f"write '{close[0]}' (valid: {listed})" if close else f"valid: {listed}"
