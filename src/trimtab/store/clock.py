"""The time of day, by which rights in a store begin and end; and what happens to those who come too late.

Not the monotonic clock: it stands still while a machine is suspended, and means nothing on another one.
"""

from __future__ import annotations

import time

from trimtab.base.errors import StoreError


class Late(StoreError):
    """The right to do it has run out, so it was not done."""


def now() -> float:
    """Returns the seconds since 1970 by the clock of this machine."""
    return time.time()


def sleep(seconds: float) -> None:
    """Waits."""
    time.sleep(seconds)


def check(before: float | None, what: str) -> None:
    """Refuses what had to be done by now.

    Raises:
        Late: it is `before` or later.
    """
    if before is not None and now() >= before:
        raise Late(f"{what}: the right to do it has run out; run it again")
