"""AdamW in float32 under weights of any type, and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from trimtab.recipe import Distillation

#: The norm to which gradients are clipped.
MAX_NORM = 1.0
#: Where a decaying schedule ends, as a share of the peak.
FLOOR = 0.1
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def schedule(step: int, steps: int, kind: str, warmup: float) -> float:
    """Returns the share of the peak learning rate at a step, 0 to steps - 1.

    It rises linearly over the first `warmup` (share) of the steps, at least one, then stays or falls to a tenth.
    """
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    gone = (step - rising) / max(1, steps - rising)
    if kind == "constant":
        return 1.0
    left = 1 - gone if kind == "linear" else (1 + math.cos(math.pi * gone)) / 2
    return FLOOR + (1 - FLOOR) * left


class Optimizer:
    """AdamW without weight decay over a student's parameters.

    Parameters in 16 bits have a float32 master each: their gradients are summed in it, the step is done on it, and
    what the step makes of it is rounded into the parameter. So the student computes with the very weights that are
    saved. Source: Micikevicius et al. 2018, "Mixed Precision Training".

    Args:
        groups: parameters of the student with a peak learning rate of their own, {"params": [...], "lr": peak}.
    """

    def __init__(self, student: nn.Module, settings: Distillation, groups: Sequence[dict[str, Any]] = ()):
        self.names = {id(parameter): name for name, parameter in student.named_parameters()}
        self.settings = settings
        apart = {id(parameter) for group in groups for parameter in group["params"]}
        rest = [p for p in student.parameters() if id(p) not in apart and p.requires_grad]
        chosen = [{"params": rest, "lr": settings.learning_rate}, *groups]
        self.pairs = [(p, _master(p)) for group in chosen for p in group["params"]]
        masters = {id(parameter): master for parameter, master in self.pairs}
        self.adam = torch.optim.AdamW(
            [{**group, "params": [masters[id(p)] for p in group["params"]]} for group in chosen],
            weight_decay=0.0,
            fused=all(master.is_cuda for _, master in self.pairs),
        )
        self.peaks = [group["lr"] for group in self.adam.param_groups]
        self._rounded = [(p, m) for p, m in self.pairs if m is not p]

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The float32 gradients gathered so far, those that there are."""
        return [master.grad for _, master in self.pairs if master.grad is not None]

    @property
    def is_finite(self) -> bool:
        """Whether all weights are finite numbers."""
        norms = torch._foreach_norm([master.detach() for _, master in self.pairs])
        return bool(torch.isfinite(torch.stack(norms)).all())

    def gather(self) -> None:
        """Adds the gradients of a backward pass to the masters'; to be called after each one."""
        for parameter, master in self._rounded:
            if parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Clips the gathered gradients, takes a step at a share of the peak learning rates, and clears them."""
        for group, peak in zip(self.adam.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        nn.utils.clip_grad_norm_([master for _, master in self.pairs], MAX_NORM)
        self.adam.step()
        if self._rounded:
            parameters, masters = zip(*self._rounded, strict=True)
            torch._foreach_copy_(parameters, masters)
        self.adam.zero_grad(set_to_none=True)

    def tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Yields the masters and the moments by the names of the student's parameters, as `load` takes them."""
        for parameter, master in self.pairs:
            name = self.names[id(parameter)]
            yield f"weight.{name}", master.detach()
            yield from ((f"{key}.{name}", value) for key, value in self.adam.state[master].items())

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes back what `tensors` gave, and rounds the masters into the student."""
        for parameter, master in self.pairs:
            name = self.names[id(parameter)]
            master.copy_(tensors[f"weight.{name}"])
            parameter.copy_(master)
            moments = {key: tensors[f"{key}.{name}"] for key in _MOMENTS if f"{key}.{name}" in tensors}
            if moments:
                self.adam.state[master] = {
                    key: value.to(master.device) if key != "step" or self.adam.defaults["fused"] else value
                    for key, value in moments.items()
                }


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float())
