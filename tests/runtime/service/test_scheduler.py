"""Scheduling without tensors: every sequence ends, nothing exceeds its limit, and each strategy forms its batches."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.base.errors import InputError
from trimtab.runtime.kv_cache.block_pool import BlockPool
from trimtab.runtime.service.scheduler import STRATEGIES, ScheduledStep, Scheduler, Sequence

LENGTHS = st.tuples(st.integers(1, 40), st.integers(1, 40))


def scheduler(blocks: int = 8, block_size: int = 4, batch: int = 3, tokens: int = 8, **options) -> Scheduler:
    return Scheduler(BlockPool(blocks, block_size), batch, tokens, **options)


def sequence(prompt: int, new: int, arrived: float = 0.0) -> Sequence:
    return Sequence([0] * prompt, new, arrived)


def compute(chosen: Scheduler, step: ScheduledStep) -> list[Sequence]:
    """Does what an engine does with a step, and returns the sequences that end."""
    growing = [work.sequence for work in step.works if work.is_last]
    chosen.done(step)
    ended = []
    for item in growing:
        item.tokens.append(1)
        if len(item.new_tokens) == item.max_new_tokens:
            chosen.remove(item)
            ended.append(item)
    return ended


def check(chosen: Scheduler, step: ScheduledStep, limit: int) -> None:
    pool = chosen.pool
    assert step.works and all(work.count > 0 for work in step.works)
    assert step.tokens <= limit
    assert len(chosen.running) <= chosen.max_batch_size
    owned = [block for table in pool.tables.values() for block in table]
    assert len(owned) == len(set(owned)) == pool.used  # no block has two owners, none is lost
    for work in step.works:
        room = len(pool.tables[work.sequence]) * pool.block_size
        assert work.sequence.computed + work.count <= min(room, len(work.sequence.tokens))


@given(
    arrivals=st.lists(st.tuples(LENGTHS, st.integers(0, 30), st.booleans()), min_size=1, max_size=12),
    blocks=st.integers(1, 25),
    block_size=st.sampled_from([1, 4, 16]),
    batch=st.integers(1, 5),
    tokens=st.integers(5, 40),
    chunked=st.booleans(),
    strategy=st.sampled_from(STRATEGIES),
)
@settings(max_examples=300, deadline=None)
def test_every_sequence_that_is_accepted_ends(arrivals, blocks, block_size, batch, tokens, chunked, strategy) -> None:
    """Whatever the lengths, the blocks, the arrivals and the cancellations."""
    chosen = Scheduler(BlockPool(blocks, block_size), batch, tokens, strategy, chunked, timeout=3)
    due: dict[int, list[tuple[Sequence, bool]]] = {}
    accepted = set()
    for (prompt, new), when, cancelled in arrivals:
        item = sequence(prompt, new, when)
        try:
            chosen.check(item)
        except InputError:
            assert item.length > blocks * block_size or (not chunked and item.length > tokens)
            continue
        due.setdefault(when, []).append((item, cancelled))
        accepted.add(item)
    ended = set()
    work = sum(item.length for item in accepted)
    # Alone, each takes a step a token; those that are preempted begin anew, but the oldest never does.
    for now in range(31 + (len(accepted) + 1) * (work + 1)):
        for item, _ in due.pop(now, []):
            chosen.submit(item)
        if now > 30:
            chosen.draining = True
        step = chosen.next_step(now)
        if step:
            check(chosen, step, tokens)
            ended.update(compute(chosen, step))
        for item in [item for item in chosen.running if len(item.new_tokens) == 2 and item.prompt_tokens % 3 == 0]:
            chosen.remove(item)  # its client has gone
            ended.add(item)
    assert ended == accepted
    assert chosen.idle and chosen.pool.free == blocks


def test_a_sequence_joins_while_others_decode_and_leaves_at_once() -> None:
    chosen = scheduler()
    first, second = sequence(3, 4), sequence(5, 1)
    chosen.submit(first)
    assert [work.count for work in chosen.next_step(0).works] == [3]
    chosen = scheduler()
    chosen.submit(first)
    compute(chosen, chosen.next_step(0))
    chosen.submit(second)
    step = chosen.next_step(0)
    assert [(work.sequence, work.count) for work in step.works] == [(first, 1), (second, 5)]
    assert compute(chosen, step) == [second]
    assert chosen.running == [first] and second not in chosen.pool.tables


def test_a_long_prompt_is_read_in_chunks_beside_decoding() -> None:
    chosen = scheduler(blocks=20, tokens=8)
    first, second = sequence(1, 9), sequence(20, 1)
    chosen.submit(first)
    compute(chosen, chosen.next_step(0))
    chosen.submit(second)
    counts = []
    while second in chosen.running or second in chosen.waiting:
        step = chosen.next_step(0)
        counts.append([work.count for work in step.works])
        compute(chosen, step)
    assert counts == [[1, 7], [1, 7], [1, 6]]


def test_the_newest_gives_way_when_blocks_run_out() -> None:
    chosen = scheduler(blocks=4, block_size=2, batch=2)
    old, new = sequence(2, 6), sequence(2, 6)
    chosen.submit(old)
    chosen.submit(new)
    ended = []
    for _ in range(40):
        step = chosen.next_step(0)
        if step:
            ended += compute(chosen, step)
    assert ended == [old, new]
    assert old.preemptions == 0 and new.preemptions > 0


@pytest.mark.parametrize(
    ("strategy", "now", "draining", "forms"),
    [
        ("static", 99.0, False, False),
        ("static", 0.0, True, True),
        ("dynamic", 0.5, False, False),
        ("dynamic", 1.0, False, True),
        ("dynamic", 0.0, True, True),
        ("in-flight", 0.0, False, True),
    ],
)
def test_when_two_of_three_begin(strategy, now, draining, forms) -> None:
    chosen = scheduler(strategy=strategy, timeout=1)
    chosen.draining = draining
    for _ in range(2):
        chosen.submit(sequence(2, 2))
    assert (chosen.next_step(now) is not None) == forms
    chosen.submit(sequence(2, 2))
    assert chosen.next_step(now) is not None


def test_a_static_batch_pads_to_its_longest_prompt_and_its_last_token() -> None:
    chosen = scheduler(blocks=20, tokens=32, strategy="static")
    for prompt, new in ((2, 1), (5, 4), (3, 2)):
        chosen.submit(sequence(prompt, new))
    late = sequence(1, 1)
    steps = []
    while chosen.running or not steps:
        step = chosen.next_step(0)
        steps.append((step.tokens, step.padding))
        compute(chosen, step)
        if len(steps) == 1:
            chosen.submit(late)  # waits for all of them
    assert steps == [(10, 5), (2, 1), (1, 2), (1, 2)]
    assert late in chosen.waiting


@pytest.mark.parametrize(
    ("options", "prompt", "new", "message"),
    [
        ({}, 0, 1, "prompt: is empty"),
        ({}, 1, 0, "max_tokens: 0 is not valid"),
        ({}, 30, 3, "exceed the 32 tokens of the KV cache"),
        ({"chunked": False}, 8, 1, "enable_chunked_prefill: true"),
    ],
)
def test_what_could_never_be_served_is_refused(options, prompt, new, message) -> None:
    with pytest.raises(InputError, match=message):
        scheduler(**options).submit(sequence(prompt, new))


def test_settings_that_would_starve_are_refused() -> None:
    with pytest.raises(InputError, match="max_num_tokens: 8 is less than engine.max_batch_size 9"):
        scheduler(batch=9)
    with pytest.raises(InputError, match="strategy: 'inflight' is not valid"):
        scheduler(strategy="inflight")


def test_a_contiguous_cache_is_filled() -> None:
    """Its sequences never need another block, so none is kept free for them."""
    scheduler = Scheduler(BlockPool(4, 32), 8, 64)
    for _ in range(5):
        scheduler.submit(Sequence([1] * 4, 28))
    scheduler.next_step(0.0)
    assert len(scheduler.running) == 4 and scheduler.pool.free == 0
