"""The command as a person runs it, in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from trimtab.pipelines.commands import main


@pytest.fixture
def trimtab(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function: runs the command and returns its exit code and what it prints, on one line."""

    def run(*options: object) -> tuple[int, str]:
        code = main.main([str(option) for option in options])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, " ".join((said.out + said.err).split())

    return run
