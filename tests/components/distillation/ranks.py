"""The processes of `test_sharding`: `python ranks.py ROUNDS`, and in each round so many train its jobs in turn.

They are forked from one that has imported what they need, with the environment that torchrun gives each of its own:
`test_processes` starts torchrun itself, whose processes take ten seconds each to import.

A round is the number of processes and their jobs. A job has the `arguments` of `work.train`, `answer`, the path of what
the first process says, and `ends_before`, the step before which all processes end as if killed, or null. The answer has
the `metrics`, and of each process the bytes of `states` that it holds: masters and moments.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

from seaweed import free_ports
from torch import distributed

from trimtab.components.distillation import work
from trimtab.components.distillation.training import resume, training
from trimtab.components.distillation.weights import quantization_aware  # noqa: F401, ModelOpt once for all forks
from trimtab.runtime.parallel import torchrun


class Killed(BaseException):
    """Not an Exception: nothing tidies up after a kill."""


def states(trained: training.Training) -> int:
    optimizer = trained.optimizer
    moments = (value for state in optimizer.adam.state.values() for value in state.values() if value.dim())
    return sum(tensor.nbytes for tensor in [*(master for _, master in optimizer.pairs), *moments])


def train(job: dict) -> dict:
    step, run, seen = training.Training.step, training.Training.run, []

    def killed_step(self: training.Training, number: int):
        if number == job["ends_before"]:
            raise Killed
        return step(self, number)

    def watched_run(self: training.Training):
        seen.append(self)
        return run(self)

    training.Training.step, training.Training.run = killed_step, watched_run
    try:
        metrics = work.train(**job["arguments"])
    except Killed:
        return {}
    finally:
        training.Training.step, training.Training.run = step, run
    held = [None] * torchrun.count()
    distributed.all_gather_object(held, states(seen[0]))
    return {"metrics": metrics, "states": held}


def train_in_turn(jobs: list[dict]) -> None:
    spaced = resume.TRAINING_OVER_SAVING
    with torchrun.joined():
        for job in jobs:
            resume.TRAINING_OVER_SAVING = spaced if job["ends_before"] is None else 0
            found = train(job)
            if torchrun.rank() == 0:
                Path(job["answer"]).write_text(json.dumps(found), encoding="utf-8")


def forked(rank: int, processes: int, port: int, jobs: list[dict]) -> int:
    """Returns the id of a process that does its part of the jobs."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
        train_in_turn(jobs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(rounds: list[tuple[int, list[dict]]]) -> int:
    """Returns 0, or 1 when a process failed: those beside it would wait for it, and are ended."""
    for (processes, jobs), port in zip(rounds, free_ports(len(rounds)), strict=True):
        left = {forked(rank, processes, port, jobs) for rank in range(processes)}
        while left:
            pid, status = os.wait()
            left.remove(pid)
            if status:
                for other in left:
                    os.kill(other, signal.SIGKILL)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
