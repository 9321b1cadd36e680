"""AdamW in float32 under weights of any type, and the learning rate over the steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from trimtab.components.distillation.training import data_parallel, sharding
from trimtab.recipe import Distillation

#: The norm to which gradients are clipped.
MAX_NORM = 1.0
#: Where a decaying schedule ends, as a share of the peak.
FLOOR = 0.1


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
    saved. Source: Micikevicius et al. 2018, "Mixed Precision Training". Of a parameter that is shared out among
    processes the part of this one is its own master, and has the moments of that part.

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
        self._rounded = [(p, m) for p, m in self.pairs if m is not p and not sharding.is_shard(p)]
        self._shards = [(p, m) for p, m in self.pairs if sharding.is_shard(p)]

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The float32 gradients gathered so far, those that there are, of what every process has whole."""
        return [m.grad for p, m in self.pairs if m.grad is not None and not sharding.is_shard(p)]

    @property
    def is_finite(self) -> bool:
        """Whether all weights are finite numbers, in all processes."""
        norms = torch._foreach_norm([master.detach() for _, master in self.pairs])
        return not data_parallel.add((~torch.isfinite(torch.stack(norms))).sum())

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
        for parameter, master in self._shards:  # they add up where they are
            master.grad = None if parameter.grad is None else sharding.local(parameter.grad)

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Clips the gathered gradients, takes a step at a share of the peak learning rates, and clears them."""
        for group, peak in zip(self.adam.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        masters = [master for _, master in self.pairs]
        if self._shards:
            nn.utils.clip_grads_with_norm_(masters, MAX_NORM, self._norm())
        else:
            nn.utils.clip_grad_norm_(masters, MAX_NORM)
        self.adam.step()
        if self._rounded:
            parameters, masters = zip(*self._rounded, strict=True)
            torch._foreach_copy_(parameters, masters)
        self.adam.zero_grad(set_to_none=True)
        for parameter, _ in self._shards:
            parameter.grad = None

    def _norm(self) -> torch.Tensor:
        """The norm of all gradients, whoever holds them."""
        apart = [m.grad for _, m in self._shards if m.grad is not None]
        squares = data_parallel.add(torch.stack(torch._foreach_norm(apart)).square().sum())
        if self.gradients:
            squares = squares + torch.stack(torch._foreach_norm(self.gradients)).square().sum()
        return squares.sqrt()

    def tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        """Yields the masters and the moments by the names of the student's parameters, in their own memory; of what is
        shared out, tensors of which this process has its part. Numbers of one are vectors of one."""
        for parameter, master in self.pairs:
            name = self.names[id(parameter)]
            yield f"weight.{name}", sharding.like(parameter, master.detach())
            for key, value in self.adam.state[master].items():
                yield f"{key}.{name}", value.view(1) if key == "step" else sharding.like(parameter, value)

    def expect(self, names: Collection[str]) -> None:
        """Makes room for the moments that have these names in `tensors`, to read them into, and for no others."""
        for parameter, master in self.pairs:
            name = self.names[id(parameter)]
            self.adam.state.pop(master, None)
            if f"step.{name}" in names:
                step = torch.zeros((), device=master.device if self.adam.defaults["fused"] else "cpu")
                moments = {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
                self.adam.state[master] = {"step": step, **moments}

    @torch.no_grad()
    def settle(self) -> None:
        """Rounds the masters into the student, after they were read."""
        for parameter, master in self._rounded:
            parameter.copy_(master)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if sharding.is_shard(parameter):
        return nn.Parameter(sharding.local(parameter.detach()))
    if parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float())
