"""Draws calibration data from a mix of sources, and says what was drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch

from trimtab.components.calibration import named
from trimtab.recipe import Calibration, Source
from trimtab.runtime import documents, text

#: A dataset may have no end: it is read until it has this many times the tokens that are drawn from it.
READ_AHEAD = 4


@dataclass(frozen=True)
class Sample:
    """Calibration data.

    `tokens` is int64 [samples, length], source by source, each row begun as the tokenizer begins a text; `text` what
    they decode to without that beginning. `report` is JSON: `samples`,
    `length`, `tokens`, `vocabulary_coverage` (share of the tokenizer's vocabulary that occurs), `document_tokens`
    (quantiles p10, median and p90 of the lengths of the documents read, in tokens), and for each of `sources`
    `source`, `samples`, `documents` (those that the samples are cut from) and `tokens_available` (read).
    """

    tokens: torch.Tensor
    text: str
    report: dict[str, Any]


def draw(settings: Calibration, tokenizer: Any) -> Sample:
    """Draws the samples of each source at random, without overlap; a function of the arguments and the texts alone.

    Raises:
        InputError: a source is missing, malformed or empty, or has too few tokens; names it.
    """
    sources = settings.sources
    counts = shares([source.weight for source in sources], settings.samples)
    room = settings.length - len(text.prefix(tokenizer))
    windows, lengths, lines = [], [], []
    for source, count in zip(sources, counts, strict=True):
        if not count:  # more sources than samples
            lines.append({"source": source.title, "samples": 0, "documents": 0, "tokens_available": 0})
            continue
        enough = READ_AHEAD * count * settings.length if source.dataset is not None else None
        pieces = _tokenize(_documents(source, settings.seed, tokenizer), tokenizer, enough)
        tokens = torch.tensor(list(chain.from_iterable(pieces)), dtype=torch.int64)
        owners = torch.arange(len(pieces)).repeat_interleave(torch.tensor([len(p) for p in pieces], dtype=torch.int64))
        field = f"calibrate.text: '{source.title}'"
        cut = [text.cut(row, room, count, settings.seed, field) for row in (tokens, owners)]
        windows.append(cut[0])
        lengths += [len(piece) for piece in pieces]
        used = {"documents": len(cut[1].unique()), "tokens_available": len(tokens)}
        lines.append({"source": source.title, "samples": count, **used})
    rows = torch.cat(windows)
    tokens = text.begin(tokenizer, rows)
    low, median, high = (round(float(q)) for q in np.quantile(lengths, (0.1, 0.5, 0.9)))
    report = {
        "samples": len(tokens),
        "length": settings.length,
        "tokens": tokens.numel(),
        "vocabulary_coverage": len(tokens.unique()) / len(tokenizer),
        "document_tokens": {"p10": low, "median": median, "p90": high},
        "sources": lines,
    }
    return Sample(tokens, "\n\n".join(tokenizer.batch_decode(rows)), report)


def shares(weights: Sequence[float], samples: int) -> list[int]:
    """Divides the samples in proportion to the weights, by the largest remainder; of equal ones the first comes first.

    A source that would get none takes one from the source with the most, as long as there are samples for all.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [samples * weight / sum(exact) for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    while samples >= len(counts) and 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def _documents(source: Source, seed: int, tokenizer: Any) -> Iterable[str]:
    if source.dataset is not None:
        return named.stream(source, tokenizer, seed)
    return documents.read(source.text, text.CALIBRATION_TEXT, tokenizer, "calibrate.text")


def _tokenize(found: Iterable[str], tokenizer: Any, enough: int | None) -> list[list[int]]:
    """Returns the tokens of each document and of the separator behind it; stops at `enough` tokens in all."""
    pieces, total = [], 0
    for document, following in pairwise(chain(found, [None])):
        separator = "" if following is None else text.SEPARATOR
        pieces.append(text.encode(tokenizer, document + separator, special=False))
        total += len(pieces[-1])
        if enough and total >= enough:
            break
    return pieces
