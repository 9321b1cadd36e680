"""What an engine is asked to do: how long requests and answers are, and how many there are at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Annotated, Any

from pydantic import Field, model_serializer, model_validator

from trimtab.base.schema import mapping
from trimtab.base.user_document import UserDocument

Tokens = Annotated[int, Field(ge=1)]


class Lengths(UserDocument):
    """A distribution of lengths: mean, p95 and max, or a histogram of which the three are computed."""

    mean: Annotated[float, Field(ge=1)] | None = None
    """The mean, in tokens."""
    p95: Tokens | None = None
    """The length that 95 of 100 stay within, in tokens."""
    max: Tokens | None = None
    """The longest, in tokens."""
    histogram: dict[Tokens, Annotated[float, Field(gt=0)]] | None = None
    """Instead of the three: how many there are of each length in tokens, {length: how many}."""

    @model_serializer(mode="wrap")
    def _as_it_is_written(self, handler: Any) -> dict[str, Any]:
        # What is computed of a histogram is not written beside it: it is read back as it was.
        return {k: v for k, v in handler(self).items() if k == "histogram" or not self.histogram}

    @model_validator(mode="after")
    def _is_whole(self) -> Lengths:
        three = (self.mean, self.p95, self.max)
        if self.histogram:
            if three != (None, None, None):
                raise ValueError("has a histogram, and mean, p95 or max beside it; write either")
            lengths = sorted(self.histogram)
            total, seen = sum(self.histogram.values()), list(accumulate(self.histogram[n] for n in lengths))
            p95 = next(n for n, count in zip(lengths, seen, strict=True) if count >= 0.95 * total * (1 - 1e-9))
            mean = sum(n * count for n, count in self.histogram.items()) / total
            for name, value in (("mean", mean), ("p95", p95), ("max", lengths[-1])):
                object.__setattr__(self, name, value)
        elif None in three:
            raise ValueError("lacks mean, p95 or max; write {mean: 500, p95: 2000, max: 4000}, or {histogram: {…}}")
        elif not self.mean <= self.max or not self.p95 <= self.max:
            raise ValueError("has a mean or p95 above its max; write max as the longest")
        return self


class Workload(UserDocument):
    """What an engine is sized for; an example is its default.

    Example::

        input: {mean: 1024, p95: 2048, max: 4096}
        output: {histogram: {64: 500, 256: 300, 1024: 20}}
        concurrency: 64
    """

    input: Lengths = Lengths(mean=1024, p95=2048, max=4096)
    """Lengths of the prompts."""
    output: Lengths = Lengths(mean=256, p95=512, max=1024)
    """Lengths of the answers."""
    concurrency: Annotated[int, Field(ge=1)] = 32
    """Requests that are answered at a time."""
    total: Tokens | None = None
    """Tokens of the longest request with its answer; the longest of both together, if absent."""

    @model_validator(mode="after")
    def _total_holds_both(self) -> Workload:
        least = max(self.input.max, self.output.max)
        if self.total is not None and self.total < least:
            raise ValueError(f"total: {self.total} is less than the longest input or output; write {least} or more")
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest request with its answer."""
        return self.total or self.input.max + self.output.max

    @property
    def held(self) -> int:
        """Tokens that `concurrency` long requests hold in the KV cache, and at least the longest one.

        Long means the 95th percentile of prompts and of answers: the chance that all are as long at once is nil, and
        the scheduler lets a request wait where it is not.
        """
        return max(self.concurrency * (self.input.p95 + self.output.p95), self.longest)

    def of_batch(self, batch: int) -> Workload:
        """Returns the workload with fewer requests at a time."""
        return self.model_copy(update={"concurrency": batch})

    @property
    def step(self) -> int:
        """Tokens of one step: a token of each running request, and a long prompt beside; in steps of 1,024.

        At least 2,048, below which a GPU's products are bound by memory, and at most 8,192, TensorRT-LLM's default,
        beyond which a step delays the next token of all others for longer than it helps.
        """
        return min(max(math.ceil((self.concurrency + self.input.p95) / 1024) * 1024, 2048), 8192)


class Recorded(UserDocument):
    """Requests that were recorded are the workload: `trimtab.serving.request_log` says what a log is.

    Example::

        recorded: s3://bucket/traffic/
        days: 7
    """

    recorded: Annotated[str, Field(min_length=1)]
    """A log or a folder of logs: a path, or s3://bucket/key, which is entered as a store in S3 is."""
    days: Annotated[float, Field(gt=0)] | None = None
    """The newest days of it that count; all if absent."""
    drift: Annotated[float, Field(gt=1)] = 1.5
    """A release stands until a length or the load is as many times what it was, or as small a part of it."""
    concurrency: Annotated[int, Field(ge=1)] | None = None
    """Requests that are answered at a time, for logs that do not say how long requests took."""


def kind(value: Any) -> str:
    """Tells what a workload is written as: 'recorded' or 'stated'."""
    is_recorded = isinstance(value, Recorded) or (isinstance(value, dict) and "recorded" in value)
    return "recorded" if is_recorded else "stated"


def parse(text: str | Mapping[str, Any]) -> Workload | Recorded:
    """Reads a workload as a recipe has it, from a text of its own or a mapping.

    Raises:
        InputError: names the field, the value and the remedy.
    """
    document = mapping(text, "workload")
    return (Recorded if kind(document) == "recorded" else Workload).parse(document)
