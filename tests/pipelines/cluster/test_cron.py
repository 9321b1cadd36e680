"""Cron expressions: what they mean, and which are refused."""

from datetime import datetime

import pytest

from trimtab.base.errors import InputError
from trimtab.pipelines.cluster.cron import Cron

AFTER = datetime(2026, 11, 24, 10, 30, 15)  # a Tuesday

NEXT = [
    ("0 3 * * 1", "0 0 3 * * 1", datetime(2026, 11, 30, 3)),
    ("0 3 * * mon", "0 0 3 * * mon", datetime(2026, 11, 30, 3)),
    ("*/15 * * * *", "0 */15 * * * *", datetime(2026, 11, 24, 10, 45)),
    ("30 30 10 * * *", "30 30 10 * * *", datetime(2026, 11, 24, 10, 30, 30)),
    ("15 30 10 * * *", "15 30 10 * * *", datetime(2026, 11, 25, 10, 30, 15)),
    ("0 0 29 2 *", "0 0 0 29 2 *", datetime(2028, 2, 29)),
    ("0 0 13 * 5", "0 0 0 13 * 5", datetime(2026, 11, 27)),  # either day is enough: the next Friday
    ("0 0 31 2 5", "0 0 0 31 2 5", datetime(2027, 2, 5)),
    ("0 0 1-7/3 jan,jul ?", "0 0 0 1-7/3 jan,jul ?", datetime(2027, 1, 1)),
    ("0 22/1 * * *", "0 0 22/1 * * *", datetime(2026, 11, 24, 22)),
]


@pytest.mark.parametrize(("expression", "six", "next_time"), NEXT)
def test_next(expression, six, next_time):
    cron = Cron.parse(expression)
    assert (cron.text, cron.next(AFTER)) == (six, next_time)


REFUSED = [
    ("0 3 * *", "has 4 fields; write 5"),
    ("@daily", "has 1 fields"),
    ("60 3 * * *", "'60' is not valid for the minute; write *, 0 to 59, a-b or */n"),
    ("0 3 * * 7", "'7' is not valid for the day of the week; write *, sun to sat, or 0 to 6"),
    ("0 3 0 * *", "'0' is not valid for the day of the month"),
    ("0 5-3 * * *", "'5-3' is not valid for the hour"),
    ("0 */0 * * *", "'*/0' is not valid for the hour"),
    ("0 3 L * *", "'l' is not valid"),
    ("0 0 30 2 *", "never fires"),
    ("0 0 31 4,6,9,11 *", "never fires"),
]


@pytest.mark.parametrize(("expression", "message"), REFUSED)
def test_refused(expression, message):
    with pytest.raises(InputError) as raised:
        Cron.parse(expression)
    assert message in str(raised.value)
