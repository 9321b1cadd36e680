"""Tokens are drawn from the distribution that the settings name."""

from __future__ import annotations

import pytest
import torch

from trimtab.base.errors import InputError
from trimtab.runtime.service.sampling import Sampling, choose

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
DRAWS = 4000


def shares(**settings: float) -> list[float]:
    sampling = Sampling(seed=0, **settings)
    tokens = [chosen.token for chosen in choose(LOGITS.expand(DRAWS, -1), [sampling] * DRAWS)]
    return [tokens.count(token) / DRAWS for token in range(4)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 1}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # squares
        ({"temperature": 1, "top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),  # 0.4 alone has less
        ({"temperature": 1, "top_p": 0.01}, [0, 1, 0, 0]),
        ({"temperature": 1, "top_p": 0}, [0, 1, 0, 0]),
    ],
)
def test_shares(settings, expected) -> None:
    error = 4 * 0.5 / DRAWS**0.5  # four standard errors of a share
    assert shares(**settings) == pytest.approx(expected, abs=error)


def test_rows_have_their_own_settings() -> None:
    rows = [Sampling(), Sampling(temperature=1, top_p=0.01), Sampling(logprobs=2), Sampling(logprobs=0)]
    found = choose(LOGITS.expand(4, -1).clone(), rows)
    assert [chosen.token for chosen in found] == [1, 1, 1, 1]
    assert [chosen.logprob is None for chosen in found] == [True, True, False, False]
    assert found[2].logprob == pytest.approx(float(LOGITS[1]))
    assert [token for token, _ in found[2].top] == [1, 3] and found[3].top == []


@pytest.mark.parametrize(("name", "value"), [("temperature", -0.1), ("top_p", 1.1), ("temperature", float("nan"))])
def test_out_of_range(name, value) -> None:
    with pytest.raises(InputError, match=f"{name}: .* is not valid"):
        Sampling(**{name: value})
