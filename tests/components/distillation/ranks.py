"""One of the processes of `test_sharding`: `torchrun ... ranks.py JOBS` trains each job in turn and answers it.

A job has the `arguments` of `work.train`, `answer`, the path of what the first process says, and `ends_before`, the
step before which all processes end as if killed, or null. The answer has the `metrics`, and of each process the bytes
of `states` that it holds: masters and moments.
"""

import json
import sys
from pathlib import Path

from torch import distributed

from trimtab.components.distillation import work
from trimtab.components.distillation.training import resume, training
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


def main(jobs: list[dict]) -> None:
    spaced = resume.TRAINING_OVER_SAVING
    with torchrun.joined():
        for job in jobs:
            resume.TRAINING_OVER_SAVING = spaced if job["ends_before"] is None else 0
            found = train(job)
            if torchrun.rank() == 0:
                Path(job["answer"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
