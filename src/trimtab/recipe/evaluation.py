"""What is measured of a model, beside its speed: the tasks, and how much of each."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trimtab.base.schema import Document

Count = Annotated[int, Field(ge=0)]


class Evaluation(Document):
    """What is measured: lm-eval tasks, and how many items and text windows each of three looks adds.

    `confirm_items` and `confirm_windows` are drawn after acceptance and are disjoint from those of the looks. Where
    there are fewer items or windows in all, each gets its share of them; `trimtab.plan.dealing` says which.

    An item is one answer, also where its task reads the answer in several ways ("filters"): `filters` names one for a
    task, such as {gsm8k: flexible-extract}. Without, it is the task's first, which for gsm8k is strict-match.
    """

    tasks: Annotated[tuple[str, ...], Field(min_length=1)] = ("trimtab_suite",)
    task_path: str = ""
    filters: dict[str, str] = {}
    items: tuple[Count, Count, Count] = (400, 600, 1000)
    windows: tuple[Count, Count, Count] = (20, 20, 20)
    confirm_items: Count = 960
    confirm_windows: Count = 16
    window_tokens: Annotated[int, Field(ge=16)] = 256
    heldout: str = "builtin"
