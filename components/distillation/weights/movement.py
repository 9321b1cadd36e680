"""Movement pruning: which weights to keep is learned while the student trains.

Each weight has a score S, zero at first. The layer multiplies with W' = W ∘ M; M keeps the weights of the highest
scores, and the gradient passes straight through it to the scores: ∂L/∂S = ∂L/∂W' ∘ W. So a weight gains score as it
moves away from zero and loses it as it shrinks, and one that is dropped goes on being scored and may return.

The paper fine-tunes for another task, whose gradient tells weights apart from the first step. Here an unpruned student
is its own teacher: there is no gradient before weights are dropped, and Adam would make scores of its rounding. So
dropping begins at once, and weights are ranked by S + a · |W| ‖x‖, the latter over the layer's root mean square, of
the weights of that step and the inputs x seen so far: what a weight adds to the layer's output, as Wanda has it,
decides until training has told more. SmolLM2-135M on an H200, 2.5 million tokens, one seed: at 85 % a perplexity of
71.3, and of 109.9 by |W| alone; at 50 % 34.3 and 33.6, which is the order that the paper found. Few small steps make
scores of noise: with six blocks of it, 85 %, 40 steps of 128 tokens, the held-out loss was 1.46 with a = 10, 1.49 by
|W| ‖x‖ alone, 1.68 with a = 1, 2.52 by |W| alone and 3.06 by S + |W|.

The hard variant drops a given share, along a cubic schedule. The soft one drops what scores below a threshold,
sigmoid(S) < τ, and pays for scores, λ · mean(sigmoid(S)): what share that is, training finds. With |W| for a score
the same schedule is gradual magnitude pruning, which is what movement pruning is to be compared with. Layers are ranked
each by itself: all together lost more, at 85 % and at 50 %.

Source: Sanh, Wolf, Rush 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (arXiv 2005.07683); the schedule
is that of Zhu and Gupta 2017, "To prune, or not to prune" (arXiv 1710.01878); |W| ‖x‖, Sun et al. 2023, "A Simple and
Effective Pruning Approach for Large Language Models" (arXiv 2306.11695).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from trimtab.components.distillation.training import data_parallel, sharding
from trimtab.components.distillation.weights import masks
from trimtab.components.distillation.weights.reparametrization import Reparametrization
from trimtab.recipe import MovementPruning
from trimtab.runtime.measure import observe

#: The share of the steps with the final sparsity.
COOLDOWN = 0.3
#: Ranking every weight takes a GPU about as long as a step, and scores move slowly.
STEPS_BETWEEN_MASKS = 8
#: The soft variant: what sigmoid(S) must exceed in the end, as in the authors' code; 0.5 is where it begins.
THRESHOLD = 0.1
#: The soft variant keeps at least this share of a layer, as in the authors' code.
LEAST_KEPT = 0.005


def first_final_step(steps: int) -> int:
    """Returns the first step with the final sparsity, below `steps`."""
    return min(math.ceil((1 - COOLDOWN) * steps), steps - 1)


def schedule(step: int, steps: int) -> float:
    """Returns the share of the final sparsity at a step: 1 - (1 - t)³, t from 0 to 1, steep where pruning is easy."""
    last = first_final_step(steps)
    return 1.0 if step >= last else 1 - (1 - step / last) ** 3


def _ranks_before(step: int, steps: int) -> bool:
    """Whether masks are made anew before a step; never after the last, whose masks the student is judged by."""
    return step < steps and (step % STEPS_BETWEEN_MASKS == 0 or step == first_final_step(steps))


def rms(weight: torch.Tensor) -> torch.Tensor:
    """Returns the root of the mean square, a scalar; one for a matrix of zeros."""
    found = weight.square().mean().sqrt()
    return found.where(found > 0, 1.0)


class _Scored(torch.autograd.Function):
    """W ∘ M, with a gradient for the scores that M was made of."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        weight, mask = ctx.saved_tensors
        return gradient * mask, (gradient * weight).float(), None


class ScoredMask(masks.Mask):
    """A mask whose scores are learned: float32, of the weight's shape.

    `inputs`, float32 [in], is the sum of squares that each input of the layer was seen to have; only its proportions
    count.
    """

    def __init__(self, mask: torch.Tensor):
        super().__init__(mask)
        self.scores = nn.Parameter(torch.zeros_like(mask, dtype=torch.float32))
        self.register_buffer("inputs", torch.zeros(mask.shape[1], dtype=torch.float32, device=mask.device))

    @torch.no_grad()
    def see(self, inputs: torch.Tensor) -> None:
        """Counts inputs [..., in]."""
        self.inputs += torch.linalg.vector_norm(inputs.flatten(0, -2), dim=0, dtype=torch.float32).square()

    def contributions(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns what each weight [out, in] adds to the output, |W| ‖x‖, in units of their root mean square."""
        norms = self.inputs.sqrt()
        sizes = weight.abs().float() * torch.where(norms.any(), norms, 1.0)
        return sizes / rms(sizes)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return _Scored.apply(weight, self.scores, self.mask)


class Movement(Reparametrization):
    """Prunes the linear layers of the blocks while they train.

    Before training the student is shown as magnitude pruning to the same sparsity makes it (the soft variant knows
    none, and shows it unpruned): this is the held-out loss that training is compared with. The unpruned student is
    no alternative, since it is not sparse.
    """

    untrained_is_an_answer = False

    def __init__(self, settings: MovementPruning):
        self.settings = settings
        self.layers: Mapping[str, nn.Linear] = {}
        self._hooks: list[RemovableHandle] = []
        self._looks = False

    @property
    def _masks(self) -> list[masks.Mask]:
        return [next(p for p in layer.parametrizations.weight if isinstance(p, masks.Mask)) for layer in self._all]

    @property
    def _all(self) -> list[nn.Linear]:
        return list(self.layers.values())

    def attach(self, student: nn.Module) -> None:
        self.layers = observe.linears(student)
        kind = masks.Mask if self.settings.scores == "magnitude" else ScoredMask
        for layer in self._all:
            mask = kind(torch.ones_like(layer.weight, dtype=torch.bool))
            parametrize.register_parametrization(layer, "weight", mask)
            if self.settings.sparsity and self.settings.magnitude_weight and isinstance(mask, ScoredMask):
                self._hooks.append(layer.register_forward_pre_hook(partial(self._see, mask)))
        if self.settings.sparsity:
            self._keep_top(self._magnitudes(), self.settings.sparsity)

    def parameter_groups(self) -> list[dict[str, Any]]:
        scores = [mask.scores for mask in self._masks if isinstance(mask, ScoredMask)]
        return [{"params": scores, "lr": self.settings.score_learning_rate}] if scores else []

    def before_step(self, step: int, steps: int) -> None:
        self.share = schedule(step, steps)
        self._looks = _ranks_before(step + 1, steps)
        if not _ranks_before(step, steps):
            return
        with torch.no_grad():
            if self.settings.sparsity:
                data_parallel.average([mask.inputs for mask in self._masks if isinstance(mask, ScoredMask)])
                self._keep_top(self._ranks(), self.share * self.settings.sparsity)
            else:
                self._keep_above(self.share * THRESHOLD)

    def penalty(self) -> torch.Tensor | float:
        if not self.settings.penalty:
            return 0.0
        means = torch.stack([score.sigmoid().mean() for score in self._scores()])
        return self.share * self.settings.penalty * means.mean()

    def is_settled(self, step: int, steps: int) -> bool:
        """The last of the schedule's masks is in place: earlier students are better and not sparse enough."""
        return step > first_final_step(steps)

    def finish(self, student: nn.Module) -> None:
        for hook in self._hooks:
            hook.remove()
        super().finish(student)

    def measures(self) -> dict[str, float]:
        kept = sum(int(mask.mask.sum()) for mask in self._masks)
        return {"zeros": 1 - kept / sum(mask.mask.numel() for mask in self._masks)}

    def _scores(self) -> list[torch.Tensor]:
        return [mask.scores for mask in self._masks]

    def _magnitudes(self) -> Iterable[torch.Tensor]:
        return (weight.abs().float() for weight in self._weights())

    def _weights(self) -> Iterable[torch.Tensor]:
        """The weights, one at a time whole in every process."""
        return (sharding.whole(layer.parametrizations.weight.original.detach()) for layer in self._all)

    def _ranks(self) -> Iterable[torch.Tensor]:
        """What the weights of each layer are ranked by."""
        if self.settings.scores == "magnitude":
            return self._magnitudes()
        weight = self.settings.magnitude_weight
        pairs = zip(self._masks, self._weights(), strict=True)
        return (mask.scores + weight * mask.contributions(w) for mask, w in pairs)

    def _see(self, mask: ScoredMask, layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Watches what a layer reads in the steps before masks are made anew; others are much the same."""
        if self._looks and torch.is_grad_enabled():
            mask.see(inputs[0])

    def _keep_top(self, scores: Iterable[torch.Tensor], sparsity: float) -> None:
        for mask, score in zip(self._masks, scores, strict=True):
            mask.mask.copy_(masks.top(score, sparsity))

    def _keep_above(self, threshold: float) -> None:
        for mask, score in zip(self._masks, self._scores(), strict=True):
            kept = score.sigmoid() > threshold
            mask.mask.copy_(kept if kept.float().mean() >= LEAST_KEPT else masks.top(score, 1 - LEAST_KEPT))
