"""What a step minimises: the student's loss on some windows, against a teacher that runs or that was stored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from trimtab.base import progress
from trimtab.base.errors import InputError
from trimtab.components.distillation.objective.chunks import loss_in_chunks
from trimtab.components.distillation.objective.loss import distillation_loss, hidden_loss, stored_distillation_loss
from trimtab.components.distillation.objective.teacher import StoredLogits
from trimtab.components.distillation.training import sharding
from trimtab.families import Logits
from trimtab.recipe import Distillation
from trimtab.runtime.decoder import head
from trimtab.runtime.measure import observe


class Objective:
    """The distillation loss of windows, in nats a token.

    Args:
        teacher: a model on the student's device, or what it said, stored.

    Raises:
        InputError: `hidden_weight` where the hidden sizes differ.
        Failure: `unsupported`, a model that changes its logits behind the output head as its family does not say.
    """

    def __init__(self, student: Any, teacher: Any, settings: Distillation):
        self.student, self.teacher, self.settings = student, teacher, settings
        runs = not isinstance(teacher, StoredLogits)
        for model in (student, teacher) if runs else (student,):
            sharding.through(model, partial(head.check, model))()
            sharding.release(model)
        self.pairs = matching_blocks(student, teacher) if settings.hidden_weight else []
        options = (settings.temperature, settings.label_weight, settings.loss)
        compiled = _compiled(distillation_loss if runs else stored_distillation_loss, student.device)
        behind = head.behind(student)
        if runs:
            said = (teacher.get_output_embeddings(), head.behind(teacher))
            self._chunk_loss = partial(_against_states, compiled, behind, *said, options)
        else:
            self._chunk_loss = lambda products, *rows: compiled(head.changed(products, behind), *rows, *options)
        self._loss = sharding.through(student, self._loss_of)
        self._taught = sharding.through(teacher, self._taught_by) if runs else None

    def __call__(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Returns the mean loss of windows, int64 [windows, length] on the device, at `places` of all windows.

        All processes that hold parts of the student call this together.
        """
        loss = self._loss(tokens, places.tolist())  # FSDP would take tensors to the device, and wait for them there
        if not torch.is_grad_enabled():
            sharding.release(self.student)
        return loss

    def _loss_of(self, tokens: torch.Tensor, places: list[int]) -> torch.Tensor:
        wanted = {"use_cache": False, "output_hidden_states": bool(self.pairs)}
        output = self.student.base_model(tokens, **wanted)
        labels = tokens[:, 1:].flatten()
        matched: torch.Tensor | float = 0.0
        if isinstance(self.teacher, StoredLogits):
            rows = self.teacher.rows(torch.tensor(places), tokens.device)
        else:
            with torch.no_grad():
                target = self._taught(tokens, **wanted)
            rows = (_predicting(target),)
            if self.pairs:
                states = [(output.hidden_states[s + 1], target.hidden_states[t + 1]) for s, t in self.pairs]
                matched = self.settings.hidden_weight * hidden_loss(*zip(*states, strict=True))
        embedding = self.student.get_output_embeddings()
        return loss_in_chunks(_predicting(output), embedding, self._chunk_loss, *rows, labels) / len(labels) + matched

    def _taught_by(self, tokens: torch.Tensor, **wanted: bool) -> Any:
        return self.teacher.base_model(tokens, **wanted)


def _predicting(output: Any) -> torch.Tensor:
    """The last hidden states of the positions that predict a token of the window, [n, h]."""
    return output.last_hidden_state[:, :-1].flatten(0, 1)


def _against_states(
    loss: Callable[..., torch.Tensor],
    behind: Logits,
    embedding: torch.nn.Linear,
    behind_teacher: Logits,
    options: tuple,
    products: torch.Tensor,
    states: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    with torch.no_grad():
        target = head.changed(F.linear(states, embedding.weight, embedding.bias), behind_teacher)
    return loss(head.changed(products, behind), target, labels, *options)


def _compiled(function: Callable[..., torch.Tensor], device: torch.device) -> Callable[..., torch.Tensor]:
    """On a GPU, where each pass over the logits counts, fuses the function's passes, if that works there."""
    if device.type != "cuda":
        return function
    chosen = [torch.compile(function)]

    def call(*arguments: Any) -> torch.Tensor:
        try:
            return chosen[0](*arguments)
        except Exception as error:  # a machine without a C compiler, or whatever else the compiler meets
            if chosen[0] is function:
                raise
            first = str(error).strip().partition("\n")[0]
            progress.report("distill", f"the loss runs uncompiled: {type(error).__name__}: {first}")
            chosen[0] = function
            return function(*arguments)

    return call


def matching_blocks(student: Any, teacher: Any) -> list[tuple[int, int]]:
    """Returns for each block of the student (its index, the index of the teacher's block that it once was).

    A block is known by its norms, which pruning leaves alone. Where they are of no help, blocks are spaced evenly.

    Raises:
        InputError: the hidden sizes differ.
    """
    ours, theirs = student.config.hidden_size, teacher.config.hidden_size
    if ours != theirs:
        raise InputError(
            f"distill.hidden_weight: the student's hidden states have {ours} numbers and the teacher's {theirs}; "
            f"write 0, or prune without changing the hidden size"
        )
    own, others = [_norms(block) for block in observe.blocks(student)], [_norms(b) for b in observe.blocks(teacher)]
    found, start = [], 0
    for block in own:
        place = next((i for i in range(start, len(others)) if _same(block, others[i])), None)
        if place is None:
            return [(i, (i + 1) * len(others) // len(own) - 1) for i in range(len(own))]
        found.append(place)
        start = place + 1
    return list(enumerate(found))


def _norms(block: torch.nn.Module) -> list[torch.Tensor]:
    return [sharding.whole(parameter.detach()).float() for parameter in block.parameters() if parameter.dim() == 1]


def _same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) > 0 and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
