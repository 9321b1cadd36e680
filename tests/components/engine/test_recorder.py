"""The log of requests on a disk that fails, and in a folder that many share."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from trimtab.base.errors import InputError
from trimtab.components.engine.server.recorder import Recorder
from trimtab.runtime.service.paged_engine import GenerationRequest
from trimtab.serving import request_log


def answered(ago: float = 2.0) -> GenerationRequest:
    request = GenerationRequest([1, 2, 3], 8)
    request.arrived = time.monotonic() - ago
    request.times = [request.arrived + 0.5]
    return request


def test_a_file_a_day_and_server(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "new" / "folder")
    assert list(recorder.folder.iterdir()) == [], "nothing is left of looking whether it can be written"
    recorder.record(answered(), "stop")
    recorder.record(answered(86400), "stop")
    days = {datetime.fromtimestamp(time.time() - ago, UTC).date().isoformat() for ago in (2, 86400)}
    assert {path.name[:10] for path in recorder.folder.iterdir()} == days
    assert all(str(os.getpid()) in path.name for path in recorder.folder.iterdir())
    found = request_log.read(str(recorder.folder))
    assert 0 <= time.time() - 2 - found.time[-1] < 60 and 0 <= found.seconds[-1] - 2 < 60


def test_a_full_disk_costs_lines_and_no_answer(tmp_path: Path, monkeypatch, capsys) -> None:
    """Half a line is taken back, so that what is recorded afterwards can be read."""
    recorder, write = Recorder(tmp_path), os.write
    recorder.record(answered(), "stop")
    monkeypatch.setattr(os, "write", lambda file, line: write(file, line[:10]))
    for _ in range(3):
        recorder.record(answered(), "stop")
    monkeypatch.undo()
    recorder.record(answered(), "length")
    assert recorder.lost == 3 and len(request_log.read(str(tmp_path))) == 2
    assert capsys.readouterr().err.count("requests are not recorded") == 1


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log")
    (tmp_path / "log").rmdir()
    recorder.record(answered(), "stop")
    assert recorder.lost == 1


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    with pytest.raises(InputError, match=r"record: '.*log' cannot be written \(File exists\); choose another"):
        Recorder(tmp_path / "log")
