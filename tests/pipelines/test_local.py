"""A run on this machine: its folder, and what its log says of how it ended."""

from __future__ import annotations

import traceback
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest

from trimtab.base import errors
from trimtab.pipelines import local


class NoonOfOneDay(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 1, 12, 0, 0)


def test_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "datetime", NoonOfOneDay)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: local._new_folder(tmp_path / "runs"), range(4)))
    first = "20260101-120000"
    assert sorted(folder.name for folder in made) == [first, f"{first}-2", f"{first}-3", f"{first}-4"]


LOGS = [
    ("trimtab.base.errors.InputError: model: 'x' does not exist", errors.InputError, "model: 'x' does not exist"),
    ("trimtab.base.errors.Failure: fetch was killed: it needed more memory than there is", errors.StageError,
     "fetch was killed: it needed more memory than there is"),
    # what ends a traceback, not what was told of on the way
    ("Traceback (most recent call last):\ntrimtab.base.errors.NotReleased: nothing is released\n"
     "retried: trimtab.base.errors.StoreError: no answer", errors.NotReleased, "nothing is released"),
    ("trimtab.base.errors.StoreError: first\n\nDuring handling, another occurred:\n\n"
     "trimtab.base.errors.InputError: second",
     errors.InputError, "second"),
    # a container's log may have something before each line
    ("[optimize] trimtab.base.errors.Damaged: a blob is missing", errors.Damaged, "a blob is missing"),
    # names of the module that are no errors
    ("trimtab.base.errors.InputError: y\ntrimtab.base.errors.nearest: x\ntrimtab.base.errors.re: x",
     errors.InputError, "y"),
    ("trimtab.base.errors.NoSuchError: x", errors.StageError, "a stage failed; its output is in "),
    ("RuntimeError: other", errors.StageError, "a stage failed; its output is in "),
]  # fmt: skip


def test_the_error_in_a_log_is_found_wherever_its_module_lies(tmp_path):
    """As Python writes it, which is with the module's name of today."""
    error = errors.NotReleased("nothing is released: it is too small")
    (tmp_path / "run.log").write_text("".join(traceback.format_exception(error)))
    found = local._error_in(tmp_path / "run.log")
    assert (type(found), str(found)) == (type(error), str(error))


@pytest.mark.parametrize(("text", "kind", "message"), LOGS)
def test_the_error_in_a_log(text, kind, message, tmp_path):
    log = tmp_path / "run.log"
    log.write_text(text + "\n")
    found = local._error_in(log)
    assert type(found) is kind and str(found).startswith(message)
