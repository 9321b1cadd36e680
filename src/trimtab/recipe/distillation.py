"""The section `distill`: what a student learns from its teacher, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_serializer, model_validator

from trimtab.recipe.fields import Count
from trimtab.schema import Document


class Distillation(Document):
    """Trains the pruned model on the logits of the unpruned one.

    With `quantization_aware` it trains with its weights rounded as `quantize` will round them.

    A step is on `batch_size` windows of `length` tokens, computed in `gradient_accumulation` parts one after the
    other where memory is short, and by `processes` side by side, a GPU each. With `activation_checkpointing` only what
    goes into each block is kept for the gradients, and the blocks are computed once more: the same gradients, a third
    more time, and a small part of the memory. `loss` is KL(teacher ‖ student) or the
    reverse; `label_weight` mixes in the text itself, `hidden_weight` adds the error of the hidden states behind each
    block. The learning rate rises over the share `warmup` of the steps and then follows `schedule`.
    `early_stopping` is a number of measurements of the held-out loss, of twenty in all, without a better one.

    `text` is one source or a list of them: "builtin", or .txt, .jsonl, .json or .csv files. `generate` is a number of
    tokens by the teacher itself besides. `stored_logits` is how many of the teacher's likeliest tokens are stored for
    each position, once, so that no later run of the same text needs the teacher; 0 runs it beside the student.

    Example::

        distill: {tokens: 20000000, batch_size: 32, generate: 4000000, stored_logits: 64}
    """

    tokens: Count
    loss: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    label_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    hidden_weight: Annotated[float, Field(ge=0)] = 0.0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    batch_size: Count = 4
    gradient_accumulation: Count = 1
    activation_checkpointing: bool = False
    processes: Count = 1
    length: Annotated[int, Field(ge=8)] = 256
    early_stopping: Annotated[int, Field(ge=0)] = 0
    text: Annotated[
        Annotated[str, Tag("one")] | Annotated[tuple[str, ...], Tag("mix")],
        Discriminator(lambda value: "mix" if isinstance(value, list | tuple) else "one"),
    ] = "builtin"
    generate: Annotated[int, Field(ge=0)] = 0
    stored_logits: Annotated[int, Field(ge=0)] = 0
    seed: int = 0
    quantization_aware: bool = False

    @model_serializer(mode="wrap")
    def _without_what_came_later(self, handler: Any) -> dict[str, Any]:
        # Recipes from before this field keep their digests, and the students that they trained are found.
        return {k: v for k, v in handler(self).items() if k != "activation_checkpointing" or v}

    @property
    def windows_at_once(self) -> int:
        """The windows of a step that one device computes at the same time."""
        return self.batch_size // (self.gradient_accumulation * self.processes)

    @property
    def texts(self) -> tuple[str, ...]:
        """The sources of text, in the order of the recipe."""
        return (self.text,) if isinstance(self.text, str) else self.text

    @model_validator(mode="after")
    def _has_text(self) -> Distillation:
        if not self.texts and not self.generate:
            raise ValueError("has no text; write text: builtin, the path of a file, or generate: a number of tokens")
        return self

    @model_validator(mode="after")
    def _divides_its_batch(self) -> Distillation:
        parts = self.gradient_accumulation * self.processes
        if self.batch_size % parts:
            raise ValueError(
                f"has batch_size {self.batch_size}, which gradient_accumulation {self.gradient_accumulation} and "
                f"processes {self.processes} do not divide; write a multiple of {parts}"
            )
        return self

    @model_validator(mode="after")
    def _hidden_states_are_not_stored(self) -> Distillation:
        if self.hidden_weight and self.stored_logits:
            raise ValueError("has hidden_weight and stored_logits, but hidden states are not stored; remove one")
        return self
