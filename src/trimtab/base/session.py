"""A child process that stays: what one call has loaded is there for the next.

Validation asks the same engine several times, look by look, and what takes longest of a look is to load the model. The
process is another one than those that made what is judged, and it is gone with the stage.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trimtab.base import child, kills
from trimtab.base.child import Done
from trimtab.base.errors import StageError


class Session:
    """Calls work as `child.call` does, all in one process, which begins with the first call.

    A call that fails ends the process, whatever it has loaded with it: the next one begins another. The peak memory of
    a call is that of the process so far. Not for several threads.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._done = -1

    def call(self, work: str, **arguments: Any) -> Done:
        """Calls "package.module:function" with JSON arguments and returns its JSON result.

        Raises:
            Failure, TrimtabError: as `child.call`.
        """
        process = self._process or self._start()
        before = kills.out_of_memory_kills()
        with tempfile.TemporaryDirectory(prefix="trimtab-") as folder:
            answer = Path(folder) / "answer.json"
            request = {"work": work, "arguments": arguments, "answer": str(answer), "parent": os.getpid()}
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                ended = not os.read(self._done, 1)
            except BrokenPipeError:
                ended = True
            except BaseException:
                process.kill()
                self.close()
                raise
            if ended:
                code = process.wait()
                self.close()
                kills.check(work.rpartition(":")[2], code, before)
                raise StageError(f"{work} ended with exit code {code} and no answer; see its log above")
            try:
                return child.done(json.loads(answer.read_text(encoding="utf-8")))
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            os.close(self._done)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _start(self) -> subprocess.Popen:
        self._done, writes = os.pipe()
        command = [sys.executable, "-m", "trimtab.base.session", str(writes)]
        streams = {"stdin": subprocess.PIPE, "pass_fds": [writes]}
        self._process = subprocess.Popen(command, text=True, env=child.environment(), **streams)
        os.close(writes)
        return self._process


def _main() -> None:
    """Answers one request a line, and says after each that the answer is written."""
    says = int(sys.argv[1])
    os.set_inheritable(says, False)
    for line in sys.stdin:
        request = json.loads(line)
        child.die_with(request["parent"])
        answer = child.answer_of(request["work"], request["arguments"])
        Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
        os.write(says, b"\n")


if __name__ == "__main__":
    _main()
