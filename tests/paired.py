"""What a baseline and a candidate scored on the same items of named tasks, made up."""

from __future__ import annotations

import math

import numpy as np

from trimtab.judge import Scores

CHANCE = 0.25


def pair(ratio: float = 1.02, **lost: int) -> tuple[Scores, Scores]:
    """Returns baseline and candidate on 600 items a task, of which the baseline has 480 and the candidate `lost` fewer.

    The task "guessed" is one that the baseline answers no better than chance.
    """
    ids = [f"{task}/{n}" for task in lost for n in range(600)]
    right = np.concatenate([np.arange(600) < (150 if task == "guessed" else 480) for task in lost]).astype(float)
    kept = np.concatenate([np.arange(600) >= count for count in lost.values()])
    nll, wiggle = np.linspace(500, 700, 48), 2 * np.sin(np.arange(48))
    tasks = [name.partition("/")[0] for name in ids]

    def scores(items: np.ndarray, likelihoods: np.ndarray) -> Scores:
        chance, tokens = np.full(len(ids), CHANCE), np.full(48, 256)
        return Scores(items, chance, likelihoods, tokens, ids, np.arange(48), tasks)

    return scores(right, nll), scores(right * kept, nll + math.log(ratio) * 256 + wiggle)
