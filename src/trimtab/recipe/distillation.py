"""The section `distill`: what a student learns from its teacher, and how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_serializer, model_validator

from trimtab.base.user_document import UserDocument
from trimtab.recipe.fields import Count


class Distillation(UserDocument):
    """Trains the pruned model, the student, on the logits of the unpruned one, its teacher.

    Example::

        distill: {tokens: 20000000, batch_size: 32, generate: 4000000, stored_logits: 64}
    """

    tokens: Count
    """Tokens that the student is trained on, in all."""
    loss: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    """What is made small: KL(teacher ‖ student), or the reverse."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Both models' logits are divided by it in the loss."""
    label_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of the loss that the text itself has, beside the teacher; 0 learns from the teacher alone."""
    hidden_weight: Annotated[float, Field(ge=0)] = 0.0
    """What the error of the hidden states behind each block counts, added to the loss; 0 leaves it out."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """The highest learning rate, at the end of the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """The share of the steps over which the learning rate rises."""
    batch_size: Count = 4
    """Windows of one step, over all processes."""
    gradient_accumulation: Count = 1
    """Parts of a step that are computed one after the other, where memory is short."""
    activation_checkpointing: bool = False
    """Keeps only what goes into each block for the gradients, and computes the blocks once more: the same gradients, a
    third more time, and a small part of the memory."""
    processes: Count = 1
    """Processes that compute a step side by side, a GPU each; each holds a part of the student, its gradients and its
    optimizer, and of the teacher."""
    length: Annotated[int, Field(ge=8)] = 256
    """Length of a window, in tokens."""
    early_stopping: Annotated[int, Field(ge=0)] = 0
    """Training ends after as many measurements of the held-out loss, of twenty in all, without a better one; 0 never
    ends it early."""
    text: Annotated[
        Annotated[str, Tag("one")] | Annotated[tuple[str, ...], Tag("mix")],
        Discriminator(lambda value: "mix" if isinstance(value, list | tuple) else "one"),
    ] = "builtin"
    """What it is trained on: "builtin" or the path of a .txt, .jsonl, .json or .csv file, or a list of them."""
    generate: Annotated[int, Field(ge=0)] = 0
    """Tokens of text that the teacher writes itself, besides; 0 for none."""
    stored_logits: Annotated[int, Field(ge=0)] = 0
    """How many of the teacher's likeliest tokens are stored for each position, once, so that no later run of the same
    text needs the teacher; 0 runs it beside the student."""
    seed: int = 0
    """Of the order of the windows and of what the teacher writes; the same seed trains the same."""
    quantization_aware: bool = False
    """Trains with the weights rounded as `quantize` will round them, and with the activations where it rounds those."""

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
