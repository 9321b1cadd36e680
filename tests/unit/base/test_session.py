"""Several calls in one process that stays, and what a failure or a death of it means."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from processes import dies_with_its_stage, gone

from trimtab.base.errors import Failure, StageError
from trimtab.base.session import Session

WORK = '''
import os, signal
from trimtab.base.errors import Failure

def expected():
    raise Failure("training_diverged", "the loss is nan at step 7")

def killed_for_memory():
    open(os.environ["OOM_COUNTER"], "w").write("low 0\\noom_kill 1\\n")
    os.kill(os.getpid(), signal.SIGKILL)

def leaves():
    os._exit(7)

def slow(started):
    open(started, "w").write(str(os.getpid()))
    import time; time.sleep(60)

loaded = []

def load(name):
    loaded.append(name)
    return {"loaded": list(loaded), "pid": os.getpid()}
'''


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "work_of_a_session.py").write_text(WORK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "work_of_a_session"


def test_what_one_call_has_loaded_is_there_for_the_next(work):
    with Session() as session:
        first = session.call(f"{work}:load", name="a")
        second = session.call(f"{work}:load", name="ä")
    assert second.value == {"loaded": ["a", "ä"], "pid": first.value["pid"]}
    assert gone(first.value["pid"]) and 0 <= second.seconds < 60 and second.peak_memory_bytes > 1 << 20


def test_after_a_failure_another_process_begins(work, oom_counter):
    with Session() as session:
        first = session.call(f"{work}:load", name="a").value["pid"]
        with pytest.raises(Failure, match="the loss is nan at step 7"):
            session.call(f"{work}:expected")
        assert gone(first)
        for function, error, message in (
            ("killed_for_memory", Failure, "killed_for_memory was killed: it needed more memory than there is"),
            ("leaves", StageError, "leaves ended with exit code 7 and no answer; see its log above"),
        ):
            with pytest.raises(error, match=message):
                session.call(f"{work}:{function}")
        assert session.call(f"{work}:load", name="b").value["loaded"] == ["b"]


def test_a_session_without_calls_starts_nothing():
    session = Session()
    session.close()
    assert session._process is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a stage must follow its run")
def test_it_dies_with_its_stage(work, tmp_path):
    started = tmp_path / "started"
    code = f"from trimtab.base.session import Session; Session().call('{work}:slow', started='{started}')"
    assert dies_with_its_stage(code, started)
