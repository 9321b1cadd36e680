"""The load generator: arrivals, and figures of a run whose times are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from serving import SETTINGS

from trimtab.components.engine.server.load_generator import (
    Lengths,
    Objective,
    Run,
    Workload,
    figures,
    interval,
    replay,
)
from trimtab.runtime.service.paged_engine import GenerationRequest, PagedEngine

WORKLOAD = Workload(4000, 50.0, Lengths(32, 200), Lengths(16, 100))


def test_arrivals_are_a_poisson_process_and_the_same_for_the_same_seed() -> None:
    drawn = WORKLOAD.draw(0, 300)
    gaps = np.diff([at for at, _ in drawn])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.07)  # four standard errors of 4,000
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # exponential

    def plain(seed: int) -> list[tuple]:
        return [(at, request.tokens, request.max_new_tokens) for at, request in WORKLOAD.draw(seed, 300)]

    assert plain(0) == plain(0)
    assert drawn[0][1].tokens != WORKLOAD.draw(1, 300)[0][1].tokens


def test_lengths_have_their_median_and_their_longest() -> None:
    lengths = Lengths(32, 200).draw(4000, np.random.default_rng(0))
    assert np.median(lengths) == pytest.approx(32, rel=0.08)
    assert min(lengths) >= 1 and max(lengths) == 200
    assert set(Lengths(9, 20, spread=0).draw(5, np.random.default_rng(0))) == {9}


def test_figures_of_known_times() -> None:
    quick, slow = GenerationRequest([1], 3, arrived=0.0), GenerationRequest([1], 2, arrived=1.0)
    quick.tokens, quick.times = [1, 5, 5, 5], [0.5, 0.75, 1.0]
    slow.tokens, slow.times = [1, 5, 5], [3.0, 4.0]
    run = Run([quick, slow], seconds=4.0, used=[2, 4], wasted=[0.5, 0.25], running=[1, 2])
    found = figures(run, Objective(first_token=1.0, between_tokens=0.3))
    assert found["tokens_per_second"] == 5 / 4
    assert found["goodput_requests_per_second"] == 1 / 4  # the slow one is late
    assert (found["first_token_p50"], found["latency_p50"]) == (1.25, 2.0)
    assert found["between_tokens_p50"] == 0.25  # of 0.25, 0.25 and 1
    assert (found["kv_blocks_used_mean"], found["kv_blocks_used_peak"], found["kv_wasted_share"]) == (3, 4, 0.375)


def test_the_interval_is_student_s() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))  # t of 2 degrees at 0.975, from a table
    assert math.isnan(interval([1.0])[1])


@pytest.mark.parametrize("strategy", ["static", "in-flight"])
def test_a_replay_serves_every_request(served: Path, strategy: str) -> None:
    engine = PagedEngine(served, SETTINGS, "cpu", strategy=strategy)
    run = replay(engine, Workload(20, 400.0, Lengths(8, 20), Lengths(6, 20)).draw(0, 300))
    assert all(len(r.times) == len(r.new_tokens) == r.max_new_tokens for r in run.requests)
    assert all(r.times[0] > r.arrived for r in run.requests)
    assert max(run.running) <= 8 and engine.pool.used == 0
    assert (engine.counts.padding > 0) == (strategy == "static")
