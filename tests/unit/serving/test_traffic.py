"""The shape of recorded traffic, by hand, and how far it moves."""

from __future__ import annotations

import numpy as np
import pytest

from trimtab.base.errors import InputError
from trimtab.recipe.workload import Recorded, Workload, parse
from trimtab.serving import traffic
from trimtab.serving.request_log import Requests
from trimtab.serving.traffic import drift, shape


def requests(time, inputs=10, outputs=20, seconds=1.0) -> Requests:
    time = np.array(time, dtype=float)
    return Requests(time, *(np.zeros(len(time), int) + np.array(value) for value in (inputs, outputs)),
                    np.zeros(len(time)) + np.array(seconds))  # fmt: skip


def test_quantiles_are_lengths_that_occurred():
    found = shape(requests(np.arange(100), inputs=np.arange(1, 101), outputs=[0] * 99 + [7]))
    ours = found.input
    assert (ours.p10, ours.p50, ours.p95, ours.p99, ours.max) == (10, 50, 95, 99, 100)
    assert (found.input.mean, found.output.mean, found.output.p99, found.output.max) == (50.5, 0.07, 0, 7)
    assert found.total == 107, "the longest request with its own answer"


def test_concurrency_is_what_requests_meet():
    """Nine requests at once for ten seconds, and one that comes when they have ended."""
    busy = requests([0] * 9 + [10], seconds=[10] * 9 + [1])
    assert shape(busy).concurrency == 9
    assert shape(requests([0, 1, 2, 3], seconds=1)).concurrency == 1, "each ends when the next one comes"
    assert shape(requests([0, 1, 2, 3], seconds=2.5)).concurrency == 3
    assert shape(requests([0, 1], seconds=0)).concurrency == 1


def test_an_idle_night_does_not_count():
    day = np.arange(0, 3600, 0.5)
    one, two = shape(requests(day)), shape(requests([*day, *(day + 86400)]))
    assert (one.rate, one.concurrency) == (two.rate, two.concurrency) == (2.0, 2)
    assert two.days == pytest.approx(1 + 1 / 24, abs=0.001)


def test_littles_law():
    """Poisson arrivals at 4 a second that take 5 seconds: 20 at a time on average, 28 in 95 of 100 cases."""
    generator = np.random.default_rng(0)
    found = shape(requests(np.cumsum(generator.exponential(0.25, 40_000)), seconds=5))
    assert 26 <= found.concurrency <= 30  # the 95th percentile of a Poisson distribution of mean 20, and itself
    assert 4.0 < found.rate < 4.7


def test_the_workload():
    found = shape(requests(np.arange(10), inputs=100, outputs=0)).workload
    assert (found.input.mean, found.input.p95, found.input.max) == (100, 100, 100)
    assert (found.output.p95, found.concurrency, found.longest) == (1, 1, 100)


def test_without_seconds_concurrency_is_given():
    unknown = requests([0, 1, 2], seconds=[1, np.nan, 1])
    assert shape(unknown).concurrency is None and shape(unknown, 8).workload.concurrency == 8
    with pytest.raises(InputError, match="does not say how long requests took; add concurrency: 32"):
        _ = shape(unknown).workload


def test_drift_of_itself_is_none():
    found = shape(requests(np.arange(10)))
    assert {times for times, _ in drift(found, found).values()} == {1.0}


def test_longer_answers():
    before, now = (shape(requests(np.arange(100), outputs=outputs)) for outputs in (20, [50] * 50 + [20] * 50))
    found = drift(before, now)
    assert {name: round(times, 3) for name, (times, _) in found.items()} == {
        "input p50": 1, "input p95": 1, "output p50": 1, "output p95": 2.5, "load": 1,
    }  # fmt: skip
    assert found["output p95"][1] == "output p95: 20 → 50 tokens, 2.50 times"
    assert drift(now, before)["output p95"][0] == pytest.approx(2.5), "shorter counts as much as longer"


@pytest.mark.parametrize(
    ("concurrency", "rate", "load"),
    [
        ((10, 30), (2.0, 6.0), 3.0),  # three times the users
        ((10, 20), (2.0, 2.0), 1.0),  # a slower engine under the same arrivals
        ((10, 10), (2.0, 6.0), 1.0),  # a faster engine with as many clients
        ((10, 5), (2.0, 4.0), 1.0),
        ((10, 5), (2.0, 0.5), 2.0),
        ((None, None), (2.0, 6.0), 3.0),
        ((None, 10), (2.0, 1.0), 2.0),
    ],
)
def test_load_is_what_moves_concurrency_and_rate_alike(concurrency, rate, load):
    some = shape(requests(np.arange(10)))
    changes = zip(concurrency, rate, strict=True)
    before, now = (some.model_copy(update={"concurrency": many, "rate": often}) for many, often in changes)
    assert drift(before, now)["load"][0] == pytest.approx(load)


def test_read_as_it_was_written():
    found = shape(requests(np.arange(0, 70, 0.7)))
    assert traffic.Traffic.parse(found.to_json()) == found


def log(path, count: int, outputs: int = 20) -> str:
    line = '{"time": %d, "input_tokens": 10, "output_tokens": %d, "seconds": 1}\n'
    path.write_text("".join(line % (second, outputs) for second in range(count)))
    return str(path)


def test_a_workload_that_was_recorded(tmp_path):
    found = traffic.of(parse(f"recorded: {log(tmp_path / 'x.jsonl', 2000)}"))
    assert (found.requests, found.workload.concurrency, found.workload.longest) == (2000, 1, 30)
    assert found.sentence == (
        "2,000 requests in 33.3 minutes, prompts of 10 tokens (95 %: 10), answers of 20 tokens (95 %: 20), "
        "1 at a time, 1 a second"
    )
    assert traffic.of(Workload()) is None and traffic.of(None) is None


def test_too_few_requests(tmp_path):
    few, many = log(tmp_path / "few.jsonl", 999), log(tmp_path / "many.jsonl", 2000)
    with pytest.raises(InputError, match=r"few.jsonl' holds 999 requests, which are too few .* record for longer"):
        traffic.of(Recorded(recorded=few))
    with pytest.raises(InputError, match=r"holds 87 requests in its last 0.001 days.*; write more days"):
        traffic.of(Recorded(recorded=many, days=0.001))
    assert traffic.of(Recorded(recorded=many, days=0.02)).requests == 1729
