"""Work in a process of its own: what comes back from it, and what a death of it means."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import dies_with_its_stage, gone, wait_for

from trimtab.base import child, environment
from trimtab.base.errors import Failure, InputError, StageError, StoreError

WORK = '''
import os, signal
from trimtab.base.errors import Failure, InputError, StoreError

IMPORTED_BY = os.getpid()

def answer(**arguments):
    return {"pid": os.getpid(), **arguments}

def ancestry():
    return [os.getpid(), os.getppid(), IMPORTED_BY]

def threads_wait():
    return os.environ["GOMP_SPINCOUNT"]

def expected():
    raise Failure("training_diverged", "the loss is nan at step 7")

def bad_input():
    raise InputError("text: 'x' is not a file; write another")

def bad_store():
    raise StoreError("no space left")

def defect():
    return {}["missing"]

def killed_for_memory():
    open(os.environ["OOM_COUNTER"], "w").write("low 0\\noom_kill 1\\n")
    os.kill(os.getpid(), signal.SIGKILL)

def killed():
    os.kill(os.getpid(), signal.SIGKILL)

def leaves():
    os._exit(7)

def memory():
    raise MemoryError()

def torch_cpu_memory():
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes\\nsecond line")

def torch_cuda_memory():
    raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.")

def other_runtime_error():
    raise RuntimeError("shapes differ")

def slow(started):
    open(started, "w").write(str(os.getpid()))
    import time; time.sleep(60)

def with_grandchild(started):
    import subprocess
    open(started, "w").write(str(subprocess.Popen(["sleep", "60"]).pid))
    import time; time.sleep(60)

def hungry():
    return len(bytearray(b"x" * (64 << 20)))
'''


@pytest.fixture
def server_socket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The socket of a fork server, which the first child starts."""
    with tempfile.TemporaryDirectory() as folder:  # a socket's path has 107 characters at most
        monkeypatch.setenv(child.FORK_SERVER, str(Path(folder) / "socket"))
        yield Path(folder) / "socket"


@pytest.fixture(params=["new process", "fork"])
def work(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that a child process can import."""
    (tmp_path / "work_for_the_test.py").write_text(WORK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if request.param == "fork":
        request.getfixturevalue("server_socket")
    return "work_for_the_test"


def test_answer(work):
    done = child.call(f"{work}:answer", text="ä", number=0.1, nothing=None, many=[1, 2])
    assert done.value.pop("pid") != os.getpid()
    assert done.value == {"text": "ä", "number": 0.1, "nothing": None, "many": [1, 2]}
    assert 0 <= done.seconds < 60


def test_threads_that_wait_leave_the_processor_to_others_unless_told_otherwise(work, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert int(child.call(f"{work}:threads_wait").value) <= 1000
    monkeypatch.setenv("GOMP_SPINCOUNT", "30000")
    assert child.call(f"{work}:threads_wait").value == "30000"


def test_peak_memory_is_the_childs(work):
    assert child.call(f"{work}:hungry").peak_memory_bytes > 64 << 20


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("expected", Failure, "the loss is nan at step 7"),
        ("bad_input", InputError, "text: 'x' is not a file; write another"),
        ("bad_store", StoreError, "no space left"),
        ("defect", StageError, "defect: KeyError: 'missing'"),
        ("leaves", StageError, "leaves ended with exit code 7 and no answer; see its log above"),
        ("other_runtime_error", StageError, "other_runtime_error: RuntimeError: shapes differ"),
        ("no_such_function", StageError, "no_such_function: AttributeError"),
        ("killed_for_memory", Failure, "killed_for_memory was killed: it needed more memory than there is"),
        ("killed", StageError, "killed was killed by somebody, or by a program that watches this machine"),
        ("memory", Failure, "memory ran out of memory"),
        ("torch_cpu_memory", Failure, "DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        ("torch_cuda_memory", Failure, "torch_cuda_memory ran out of memory: CUDA out of memory."),
    ],
)
def test_failures(work, oom_counter, function, error, message):
    with pytest.raises(error) as caught:
        child.call(f"{work}:{function}")
    assert type(caught.value) is error and message in str(caught.value) and "second line" not in str(caught.value)


@pytest.mark.parametrize(
    ("function", "failure_class"),
    [("expected", "training_diverged"), ("killed_for_memory", "does_not_fit"), ("memory", "does_not_fit"),
     ("torch_cpu_memory", "does_not_fit"), ("torch_cuda_memory", "does_not_fit")],
)  # fmt: skip
def test_failure_classes(work, oom_counter, function, failure_class):
    with pytest.raises(Failure) as caught:
        child.call(f"{work}:{function}")
    assert caught.value.failure_class == failure_class


def test_where_nothing_counts_kills_memory_is_the_likeliest_reason(work, oom_counter):
    oom_counter.unlink()
    with pytest.raises(Failure, match="killed was killed: it most likely needed more memory") as caught:
        child.call(f"{work}:killed")
    assert caught.value.failure_class == "does_not_fit"


def test_an_earlier_kill_for_memory_is_not_this_one(work, oom_counter):
    oom_counter.write_text("oom_kill 7\n")
    with pytest.raises(StageError, match="memory had not run out; run the same again"):
        child.call(f"{work}:killed")


def test_no_such_module():
    with pytest.raises(StageError, match="ModuleNotFoundError"):
        child.call("trimtab.nothing_here:work")


@pytest.mark.skipif(sys.platform != "linux", reason="processes are waited for by descriptor")
@pytest.mark.parametrize("work", ["fork"], indirect=True)
def test_forks_of_a_run_share_what_the_first_imported(work, server_socket, monkeypatch):
    first, second = (child.call(f"{work}:ancestry").value for _ in range(2))
    assert first[0] != second[0] and first[1:] == second[1:] == [first[1], first[1]]
    # What a library read when it was imported does not hold under another environment.
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    own, parent, imported_by = child.call(f"{work}:ancestry").value
    assert own == imported_by and parent == os.getpid()
    server_socket.unlink()
    assert wait_for(lambda: gone(first[1]))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are waited for by descriptor")
@pytest.mark.parametrize("work", ["fork"], indirect=True)
def test_a_fork_server_imports_what_later_children_want(work, tmp_path, monkeypatch):
    by = tmp_path / "by"
    (tmp_path / "wanted_later.py").write_text(f"import os\nopen({str(by)!r}, 'a').write(f'{{os.getpid()}} ')")
    monkeypatch.setenv(child.IMPORTS_AHEAD, "nothing_here,wanted_later")
    server = child.call(f"{work}:ancestry").value[1]
    assert wait_for(lambda: by.exists() and by.read_text())
    assert by.read_text() == f"{server} "


@pytest.mark.skipif(sys.platform != "linux", reason="processes are waited for by descriptor")
def test_where_gpus_are_a_fork_imports_its_work_itself(monkeypatch, tmp_path):
    """So that a library that starts their driver does it in the child."""
    (tmp_path / "work_on_a_gpu.py").write_text(WORK)
    code = "from trimtab.base import environment, fork_server as s; environment.has_gpu = lambda: True; s._main()"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "socket"
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv(child.FORK_SERVER, str(path))
        server = subprocess.Popen([sys.executable, "-c", code, str(path)], env=child.environment())
        assert wait_for(path.exists, 60)
        own, parent, imported_by = child.call("work_on_a_gpu:ancestry").value
    assert parent == server.pid and imported_by == own
    server.wait(60)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are waited for by descriptor")
@pytest.mark.parametrize("work", ["fork"], indirect=True)
def test_where_an_import_has_started_the_gpus_driver_children_are_new_processes(work, tmp_path):
    started = "from trimtab.base import environment; environment.has_started_gpus = lambda: True\n"
    (tmp_path / "starts_gpus.py").write_text(started + WORK)
    assert child.call(f"{work}:ancestry").value[1] != os.getpid()
    assert child.call("starts_gpus:ancestry").value[1] == os.getpid()
    assert child.call(f"{work}:ancestry").value[1] == os.getpid()


@pytest.mark.parametrize("code, started", [(3, False), (0, True), (100, True)])  # not initialized; fine; no device
def test_the_gpus_driver_tells_whether_it_was_started(monkeypatch, code, started):
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(cuDeviceGetCount=lambda _: code))
    assert environment.has_started_gpus() is started


def test_a_driver_that_nothing_has_loaded_was_not_started(monkeypatch):
    def missing(*_, **__):
        raise OSError

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert not environment.has_started_gpus()


@pytest.mark.skipif(sys.platform != "linux", reason="processes are waited for by descriptor")
@pytest.mark.parametrize("work", ["fork"], indirect=True)
def test_a_fork_server_that_is_killed_is_replaced(work, server_socket):
    server = child.call(f"{work}:ancestry").value[1]
    os.kill(server, signal.SIGKILL)
    assert wait_for(lambda: gone(server))
    assert child.call(f"{work}:ancestry").value[1] not in (server, os.getpid())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a stage must follow its run")
def test_a_child_dies_with_its_stage(work, tmp_path):
    started = tmp_path / "started"
    code = f"from trimtab.base import child; child.call('{work}:slow', started='{started}')"
    assert dies_with_its_stage(code, started)


def test_the_time_limit_ends_the_child_and_what_it_started(work, tmp_path):
    started = tmp_path / "started"
    with pytest.raises(StageError, match=r"with_grandchild was not done after 3 s and was ended; see its log above"):
        child.call(f"{work}:with_grandchild", started=str(started), time_limit=3)
    assert wait_for(lambda: gone(int(started.read_text())))
    assert child.call(f"{work}:answer", time_limit=60).value["pid"]


def test_a_stage_ends_when_its_run_is_gone(tmp_path):
    run = subprocess.Popen(["sleep", "60"])
    code = "import time; from trimtab.base import child; child.follow_run(); time.sleep(60)"
    stage = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, child.RUN_PID: str(run.pid)})
    time.sleep(0.5)
    assert stage.poll() is None
    run.kill()
    run.wait()
    assert stage.wait(timeout=60) == 1
