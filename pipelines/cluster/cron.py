"""Cron expressions as KFP's scheduler reads them (robfig/cron): second, minute, hour, day, month, weekday; UTC.

They are read here because KFP's client sends them unread, and cronsim refuses the `?` of that scheduler, takes its
`L` and its weekday 7, which that scheduler does not, and names of a wrong expression no more than the field.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from trimtab.base.errors import InputError

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
#: name, lowest, highest, words
FIELDS = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, MONTHS),
    ("day of the week", 0, 6, WEEKDAYS),
)
#: After so many days the calendar repeats every pair of date and leap year that an expression can ask for.
HORIZON_DAYS = 8 * 366


@dataclass(frozen=True)
class Cron:
    """A schedule. `text` has six fields, as KFP wants them."""

    text: str
    values: tuple[frozenset[int], ...]
    any_day: bool
    any_weekday: bool

    @classmethod
    def parse(cls, expression: str) -> Cron:
        """Reads five fields (then at second 0) or six.

        Raises:
            InputError: a field that is not valid, or a date that never comes.
        """
        fields = expression.split()
        if len(fields) == 5:
            fields = ["0", *fields]
        if len(fields) != 6:
            raise InputError(
                f"cron: '{expression}' has {len(fields)} fields; write 5 (minute hour day month weekday) or 6 "
                "(second first), such as '0 3 * * 1'"
            )
        values = tuple(_values(text, *field) for text, field in zip(fields, FIELDS, strict=True))
        cron = cls(" ".join(fields), values, fields[3][0] in "*?", fields[5][0] in "*?")
        if cron.next(datetime(2027, 1, 1)) is None:
            raise InputError(f"cron: '{expression}' never fires: no month that it names has such a day; correct either")
        return cron

    def next(self, after: datetime) -> datetime | None:
        """Returns the next time, later than `after` (UTC); None when there is none in eight years."""
        seconds, minutes, hours, _, _, _ = self.values
        for offset in range(HORIZON_DAYS):
            day = datetime(after.year, after.month, after.day) + timedelta(days=offset)
            if not self._day(day):
                continue
            times = (day.replace(hour=h, minute=m) for h in sorted(hours) for m in sorted(minutes))
            for minute in times:
                if minute + timedelta(seconds=max(seconds)) > after:
                    return next(
                        time for time in (minute.replace(second=second) for second in sorted(seconds)) if time > after
                    )
        return None

    def _day(self, day: datetime) -> bool:
        """Where both days are restricted, either is enough, as in every cron."""
        _, _, _, days, months, weekdays = self.values
        if day.month not in months:
            return False
        date, weekday = day.day in days, day.isoweekday() % 7 in weekdays
        return (date and weekday) if self.any_day or self.any_weekday else (date or weekday)


def _values(text: str, name: str, low: int, high: int, words: tuple[str, ...]) -> frozenset[int]:
    found: set[int] = set()
    for part in text.lower().split(","):
        span, slash, step = part.partition("/")
        first, dash, last = span.partition("-")
        try:
            every = int(step) if slash else 1
            if span in ("*", "?"):
                begin, end = low, high
            else:
                begin = _number(first, low, words)
                end = _number(last, low, words) if dash else high if slash else begin
            if not (low <= begin <= end <= high and every >= 1):
                raise ValueError
        except ValueError:
            shown = f"{words[0]} to {words[-1]}, or {low} to {high}" if words else f"{low} to {high}"
            raise InputError(f"cron: '{part}' is not valid for the {name}; write *, {shown}, a-b or */n") from None
        found.update(range(begin, end + 1, every))
    return frozenset(found)


def _number(text: str, low: int, words: tuple[str, ...]) -> int:
    return words.index(text) + low if text in words else int(text)
