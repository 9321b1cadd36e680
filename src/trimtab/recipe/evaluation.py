"""What is measured of a model, beside its speed: the tasks, and how much of each."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_serializer

from trimtab.base.user_document import UserDocument

Count = Annotated[int, Field(ge=0)]

#: Fields that are written down only where they differ from their defaults: a release from before them stays current.
_LATER = ("power", "true_recovery")


class Evaluation(UserDocument):
    """What is measured of a model: lm-eval tasks and the perplexity of a text, in up to three looks.

    A look that decides ends the measuring. Where there are fewer items or windows than all looks ask for, each gets its
    share of them; `trimtab.planning.dealing` says which. Where the items could not decide, the last look and the
    confirmation draw more, as far as the tasks have them.

    Example::

        tasks: [trimtab_suite]
        items: [400, 600, 1000]
        windows: [20, 20, 20]
        confirm_items: 960
        confirm_windows: 16
        heldout: builtin
    """

    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("trimtab_suite",)
    """Names of lm-eval tasks or groups; trimtab's own suite, which needs no network, if absent."""
    task_path: str = ""
    """A folder with the YAMLs of tasks of your own; none if absent."""
    filters: dict[str, str] = {}
    """The way in which a task's answer is read, of those ("filters") that the task has: {gsm8k: flexible-extract}. The
    task's first where none is named, which for gsm8k is strict-match. An item is one answer in any case."""
    items: tuple[Count, Count, Count] = (400, 600, 1000)
    """How many items of the tasks the first, second and third look each add."""
    windows: tuple[Count, Count, Count] = (20, 20, 20)
    """How many windows of the held-out text the first, second and third look each add."""
    confirm_items: Count = 960
    """Items that are kept for the confirmation after acceptance; no look sees them."""
    confirm_windows: Count = 16
    """Windows of the held-out text that are kept for the confirmation after acceptance; no look sees them."""
    power: Annotated[float, Field(ge=0, lt=1)] = 0.8
    """The probability with which an artifact that truly keeps `true_recovery` should be shown to be good enough: the
    last look and the confirmation draw as many items as that takes, as far as the tasks have them, and a run whose
    items could not decide ends after its baseline. 0 draws what is written here, and only says what it can show."""
    true_recovery: Annotated[float, Field(gt=0, le=1)] | None = None
    """The recovery that ought to be shown; three fifths of the way from the limit to 1 if absent, 0.98 for 0.95."""
    window_tokens: Annotated[int, Field(ge=16)] = 256
    """Length of a window of the held-out text, in tokens."""
    heldout: str = "builtin"
    """The text whose perplexity is measured: "builtin", or the path of a .txt, .jsonl, .json or .csv file."""

    @model_serializer(mode="wrap")
    def _without_what_came_later(self, handler: Any) -> dict[str, Any]:
        fields = type(self).model_fields
        return {k: v for k, v in handler(self).items() if k not in _LATER or v != fields[k].default}
