"""Which sequences compute how many tokens in the next step: decisions about numbers, without tensors or clocks.

| strategy | a batch forms | a sequence joins, and leaves |
|---|---|---|
| in-flight | at every step | as soon as there is room, and when it ends |
| dynamic | of `max_batch_size` sequences, or when the oldest has waited `timeout` seconds | when all of it have ended |
| static | of `max_batch_size` sequences, or when no more will come | when all of it have ended |

The last two pad: every prompt counts as the longest of its batch, and a sequence that has ended is computed on until
the last one ends. In-flight batching is Orca's (Yu et al. 2022, OSDI); its steps read long prompts in chunks of what
the token budget leaves beside the sequences that decode (Agrawal et al. 2023, Sarathi, arXiv 2308.16369).

When blocks run out, the sequence that came last gives its own back and is computed again later. The oldest is never
preempted by another and fits the cache alone, or `submit` refuses it; so the oldest always ends, and nothing waits
for ever.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from trimtab.base.errors import InputError
from trimtab.runtime.kv_cache.block_pool import BlockPool

Strategy = Literal["in-flight", "dynamic", "static"]
STRATEGIES: tuple[Strategy, ...] = ("in-flight", "dynamic", "static")


@dataclass(eq=False)
class Sequence:
    """A prompt and what was generated after it.

    Args:
        tokens: the prompt; generated tokens are appended.
        max_new_tokens: tokens to generate at most.
        arrived: seconds on the caller's clock.
    """

    tokens: list[int]
    max_new_tokens: int
    arrived: float = 0.0
    prompt_tokens: int = field(init=False)
    #: Tokens whose keys and values are in the cache.
    computed: int = field(init=False, default=0)
    preemptions: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)

    @property
    def length(self) -> int:
        """The most tokens that it can have."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    @property
    def tells_prompt(self) -> bool:
        """Whether somebody asks how likely the tokens are that it reads next."""
        return False


@dataclass(frozen=True)
class Work:
    """The next `count` tokens of a sequence; with its last known one a new token can be chosen."""

    sequence: Sequence
    count: int

    @property
    def is_last(self) -> bool:
        return self.sequence.computed + self.count == len(self.sequence.tokens)


@dataclass(frozen=True)
class ScheduledStep:
    """What one forward pass computes: `works`, and so many tokens of `padding` that nobody reads."""

    works: list[Work]
    padding: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that are read."""
        return sum(work.count for work in self.works)


class Scheduler:
    """Holds the sequences that wait and run, and decides about each step.

    Args:
        max_batch_size: sequences that run together at most.
        max_num_tokens: tokens of a step at most, without padding.
        chunked: whether a prompt may be read in several steps; else one that exceeds `max_num_tokens` is refused.
        timeout: seconds that a dynamic batch waits for more.

    Raises:
        InputError: an unknown strategy, or a token budget that does not let a whole batch decode.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_batch_size: int,
        max_num_tokens: int,
        strategy: Strategy = "in-flight",
        chunked: bool = True,
        timeout: float = 0.1,
    ):
        if strategy not in STRATEGIES:
            raise InputError(f"strategy: '{strategy}' is not valid; write one of {', '.join(STRATEGIES)}")
        if max_num_tokens < max_batch_size:
            raise InputError(
                f"engine.max_num_tokens: {max_num_tokens} is less than engine.max_batch_size {max_batch_size}, and "
                f"each sequence of a batch needs one token of a step; raise it or lower max_batch_size"
            )
        self.pool, self.strategy, self.timeout = pool, strategy, timeout
        self.max_batch_size, self.max_num_tokens, self.chunked = max_batch_size, max_num_tokens, chunked
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        #: No more sequences will come: a static batch need not wait for any.
        self.draining = False
        self._batch = _Batch()

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running)

    def check(self, sequence: Sequence) -> None:
        """Raises InputError where a sequence is empty, asks for nothing, or could not be computed even alone."""
        if not sequence.prompt_tokens:
            raise InputError("prompt: is empty; give at least one token")
        if sequence.max_new_tokens < 1:
            raise InputError(f"max_tokens: {sequence.max_new_tokens} is not valid; write at least 1")
        room = self.pool.blocks * self.pool.block_size
        asked = f"{sequence.prompt_tokens} tokens of prompt and {sequence.max_new_tokens} new ones"
        if sequence.length > room:
            raise InputError(f"prompt: {asked} exceed the {room} tokens of the KV cache; ask for fewer")
        if not self.chunked and sequence.length > self.max_num_tokens:
            raise InputError(
                f"prompt: {asked} exceed engine.max_num_tokens {self.max_num_tokens}; raise it or write "
                f"enable_chunked_prefill: true"
            )

    def submit(self, sequence: Sequence) -> None:
        """Lets a sequence wait for its turn; raises what `check` does."""
        self.check(sequence)
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence that has ended or is no longer wanted, and frees its blocks."""
        self.pool.release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def next_step(self, now: float) -> ScheduledStep | None:
        """Returns what to compute next, or None when there is nothing to do yet.

        The caller computes it and says `done`, appends a token to every sequence whose `Work.is_last`, and removes
        those that have ended.
        """
        return self._in_flight() if self.strategy == "in-flight" else self._batched(now)

    def done(self, step: ScheduledStep) -> None:
        """Notes that the keys and values of a step are in the cache."""
        for work in step.works:
            work.sequence.computed += work.count

    # ------------------------------------------------------------------------------------------------ in-flight

    def _in_flight(self) -> ScheduledStep | None:
        works = [Work(sequence, 1) for sequence in self._decoding()]
        budget = self.max_num_tokens - len(works)
        for sequence in self.running:  # prompts that are being read have their blocks
            count = min(_missing(sequence), budget)
            if _missing(sequence) > 1 and count:
                works.append(Work(sequence, count))
                budget -= count
        works += self._admit(budget)
        return ScheduledStep(works) if works else None

    def _decoding(self) -> list[Sequence]:
        """The running sequences that have one token to compute, each with room for it; the last may lose theirs."""
        chosen, preempted = [], set()
        for sequence in list(self.running):
            if _missing(sequence) != 1 or sequence in preempted:
                continue
            while not self.pool.grow(sequence, len(sequence.tokens)):
                last = self.running[-1]
                self._preempt(last)
                preempted.add(last)
                if last is sequence:
                    break
            else:
                chosen.append(sequence)
        return chosen

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit(self, budget: int) -> list[Work]:
        """Lets sequences join, first come, first served, and returns their first tokens.

        One joins when there are blocks for all its tokens and one more for each that runs and is not at its last block:
        else it would soon be preempted, or preempt.
        """
        works: list[Work] = []
        if not self.waiting:
            return works
        pool = self.pool
        growing = sum(pool.needed(sequence.length) > len(pool.tables[sequence]) for sequence in self.running)
        while self.waiting and len(self.running) < self.max_batch_size and budget > 0:
            whole = len(self.waiting[0].tokens)
            if not self.chunked and whole > budget:
                break
            if pool.needed(whole) + growing > pool.free:
                break
            sequence = self.waiting.popleft()
            pool.grow(sequence, whole)
            growing += pool.needed(sequence.length) > pool.needed(whole)
            self.running.append(sequence)
            works.append(Work(sequence, min(whole, budget)))
            budget -= works[-1].count
        return works

    # ----------------------------------------------------------------------------------------- static and dynamic

    def _batched(self, now: float) -> ScheduledStep | None:
        if not self.running:
            if not self._forms(now):
                return None
            self._form()
        works, budget = [], self.max_num_tokens
        for sequence in self.running:  # all prompts are read before any sequence goes on
            count = min(_missing(sequence), budget)
            whole = count == _missing(sequence)
            if sequence.computed < sequence.prompt_tokens and count and (whole or self.chunked):
                works.append(Work(sequence, count))
                budget -= count
        if works:
            ends = sum(work.is_last for work in works)
            read = sum(work.sequence.prompt_tokens for work in works if work.is_last)
            return ScheduledStep(works, ends * self._batch.longest - read)
        return ScheduledStep([Work(sequence, 1) for sequence in self.running], self._batch.size - len(self.running))

    def _forms(self, now: float) -> bool:
        if not self.waiting:
            return False
        late = self.strategy == "dynamic" and now - self.waiting[0].arrived >= self.timeout
        return late or self.draining or len(self.waiting) >= self.max_batch_size

    def _form(self) -> None:
        """Takes what fits at full length, so that a batch never runs out of blocks."""
        while self.waiting and len(self.running) < self.max_batch_size:
            if not self.pool.grow(self.waiting[0], self.waiting[0].length):
                break
            self.running.append(self.waiting.popleft())
        self._batch = _Batch(len(self.running), max(sequence.prompt_tokens for sequence in self.running))


@dataclass(frozen=True)
class _Batch:
    """Of a static or dynamic batch: its sequences when it formed, and its longest prompt in tokens."""

    size: int = 0
    longest: int = 0


def _missing(sequence: Sequence) -> int:
    return len(sequence.tokens) - sequence.computed
