"""The verdict on one attempt: a statement about the candidate against the baseline, with its certainty.

| file | idea |
|---|---|
| `record` | what is said of an attempt, and the closed list of why one fails |
| `scores` | what a model scored, and whether two models answered the same |
| `judging` | accepted, rejected or indeterminate: by error rates that it states |
| `gains` | whether an accurate candidate is any better at its goal |
"""

from trimtab.judge.gains import check_gain, gain
from trimtab.judge.record import FAILURE_CLASSES, KV_CACHE_SUSPECT, Confirmation, FailureClass, Measurements, Verdict
from trimtab.judge.scores import NotPaired, Scores
from trimtab.judge.statistics import Interval
from trimtab.judge.verdict import blame_kv_cache, confirm, judge

__all__ = [
    "Confirmation",
    "FAILURE_CLASSES",
    "FailureClass",
    "Interval",
    "KV_CACHE_SUSPECT",
    "Measurements",
    "NotPaired",
    "Scores",
    "Verdict",
    "blame_kv_cache",
    "check_gain",
    "confirm",
    "gain",
    "judge",
]
