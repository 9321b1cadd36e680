"""Tasks that are forked: as kfp starts them, but for what they need not import again."""

import pytest
from kfp import dsl, local
from kfp.local import subprocess_task_handler

from trimtab.pipelines import tasks


@dsl.component(base_image="python:3", install_kfp_package=False)
def tell(ending: str) -> str:
    import os
    import signal
    import sys

    if ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending:
        raise ValueError(f"it is {ending}")
    print("this is printed")
    return f"{os.getppid()} {'trimtab.stages' in sys.modules} {os.environ['_KFP_RUNTIME']} {os.environ.get('TOLD')}"


@pytest.fixture(autouse=True)
def kfp_local(tmp_path):
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path), raise_on_error=True)


def ask(ending=""):
    """What the task says: its parent, whether it has what tasks share, and what stands in its environment."""
    return tell(ending=ending).output.split()


def test_tasks_have_one_parent_that_has_imported_what_they_share(capfd):
    with tasks.forked():
        first, second = ask(), ask()
    assert first == second == [first[0], "True", "true", "None"]
    assert capfd.readouterr().out.count("this is printed") == 2


@pytest.mark.parametrize(
    ("ending", "told"), [("broken", "ValueError: it is broken"), ("killed", "_execute was killed")]
)
def test_a_task_that_fails_says_so_and_the_next_one_runs(ending, told, capfd):
    with tasks.forked():
        with pytest.raises(RuntimeError):
            ask(ending)
        printed = capfd.readouterr()
        assert ask()[1] == "True"
    assert told in printed.out + printed.err


def test_another_environment_is_another_process(monkeypatch):
    """What stands in it may shape what is imported."""
    with tasks.forked():
        before = ask()
        monkeypatch.setenv("TOLD", "otherwise")
        after = ask()
    assert after == [after[0], "False", "true", "otherwise"] and after[0] != before[0]


def test_afterwards_kfp_starts_its_own():
    started = subprocess_task_handler.run_local_subprocess
    with tasks.forked():
        assert subprocess_task_handler.run_local_subprocess != started
    assert subprocess_task_handler.run_local_subprocess == started
