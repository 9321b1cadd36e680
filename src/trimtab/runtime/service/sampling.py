"""Chooses the next token of each sequence: the likeliest, or one drawn as its own settings say."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch

from trimtab.base.errors import InputError


@dataclass
class Sampling:
    """How a sequence's tokens are chosen, with OpenAI's names.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: tokens are drawn from the smallest set that has this probability (Holtzman et al. 2020,
            arXiv 1904.09751).
        seed: makes the draws those of another request with the same seed, whatever runs beside them.
        logprobs: the number of likeliest tokens to tell with each chosen one; None tells nothing.

    Raises:
        InputError: names the field that is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    _draws: random.Random = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, highest in (("temperature", 2), ("top_p", 1), ("logprobs", 20)):
            value = getattr(self, name) or 0
            if not math.isfinite(value) or not 0 <= value <= highest:
                raise InputError(f"{name}: {value} is not valid; write a number from 0 to {highest}")
        self._draws = random.Random(self.seed)

    def draw(self) -> float:
        """Returns the next number from 0 to 1 of this sequence."""
        return self._draws.random()


@dataclass(frozen=True)
class Chosen:
    """A token, its log-probability in nats, and the likeliest tokens with theirs, where they were asked for."""

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


def choose(logits: torch.Tensor, settings: list[Sampling]) -> list[Chosen]:
    """Returns a token for each row of logits [n, vocabulary]; log-probabilities are those at temperature 1."""
    tokens = logits.argmax(-1)
    drawn = [row for row, sampling in enumerate(settings) if sampling.temperature > 0]
    if drawn:
        tokens[drawn] = _draw(logits[drawn].float(), [settings[row] for row in drawn])
    told = [row for row, sampling in enumerate(settings) if sampling.logprobs is not None]
    chosen = [Chosen(token) for token in tokens.tolist()]
    if told:
        log_probs = logits[told].float().log_softmax(-1)
        most = max(settings[row].logprobs or 0 for row in told)
        values, indices = log_probs.topk(max(1, most), dim=-1)
        own = log_probs.gather(1, tokens[told][:, None])[:, 0].tolist()
        for row, logprob, names, log_ps in zip(told, own, indices.tolist(), values.tolist(), strict=True):
            count = settings[row].logprobs or 0
            top = list(zip(names, log_ps, strict=True))[:count]
            chosen[row] = Chosen(chosen[row].token, logprob, top)
    return chosen


def _draw(logits: torch.Tensor, settings: list[Sampling]) -> torch.Tensor:
    """Draws by inverting the distribution, likeliest token first, so that one number from 0 to 1 is all it takes."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    scaled = logits / column([max(s.temperature, 1e-5) for s in settings])
    probabilities, order = scaled.softmax(-1).sort(dim=-1, descending=True)
    sums = probabilities.cumsum(-1)
    kept = sums - probabilities < column([s.top_p for s in settings])
    kept[:, 0] = True
    sums = (probabilities * kept).cumsum(-1)
    # The last sum, not 1, is the whole; a draw never reaches it, but its product may by rounding.
    places = torch.searchsorted(sums, column([s.draw() for s in settings]) * sums[:, -1:], right=True)
    places = places.minimum(kept.sum(-1, keepdim=True) - 1)
    return order.gather(1, places)[:, 0]
