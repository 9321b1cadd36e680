"""The verdict on one attempt: a statement about the candidate against the baseline, with its certainty.

| file | idea |
|---|---|
| `record` | what is said of an attempt, and the closed list of why one fails |
| `scores` | what a model scored, and whether two models answered the same |
| `criteria` | what must be shown to hold, each an interval beside its limit |
| `verdict` | accepted, rejected or indeterminate: by error rates that it states |
| `damage` | what was lost, by task and by place in the text |
| `power` | what a number of items can show, before they are asked |
| `gains` | whether an accurate candidate is any better at its goal |
"""

from trimtab.judge.damage import Damage, TaskDamage, Text
from trimtab.judge.gains import check_gain, gain
from trimtab.judge.record import (
    FAILURE_CLASSES,
    KV_CACHE_SUSPECT,
    Beside,
    Confirmation,
    FailureClass,
    Measurements,
    Verdict,
)
from trimtab.judge.scores import NotPaired, Scores
from trimtab.judge.statistics import Interval
from trimtab.judge.verdict import blame_kv_cache, confirm, judge

__all__ = [
    "Beside",
    "Confirmation",
    "Damage",
    "FAILURE_CLASSES",
    "FailureClass",
    "Interval",
    "KV_CACHE_SUSPECT",
    "Measurements",
    "NotPaired",
    "Scores",
    "TaskDamage",
    "Text",
    "Verdict",
    "blame_kv_cache",
    "check_gain",
    "confirm",
    "gain",
    "judge",
]
