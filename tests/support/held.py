"""Run a module as `python -m` does, and hold its training at a step until the test that waits for it has acted.

    HOLD_AT=3 HOLD_FILE=/some/held python -m tests.support.held jobs.pretrain ...

The file appears when the step is recorded, and training goes on when it is removed. So a signal or a kill lands in the middle of a run,
however slow the machine is and whichever process it favours.
"""

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnnjepa.run.folder import RunFolder


def hold(file: Path, at_step: int) -> None:
    """Have the first run of this process that reaches `at_step` wait there."""
    honest = RunFolder.record

    def record(run: RunFolder, kind: str, step: int, values: dict[str, Any]) -> None:
        honest(run, kind, step, values)
        if kind == "step" and step == at_step:
            file.touch()
            while file.exists():
                time.sleep(0.005)

    RunFolder.record = record  # type: ignore[method-assign]


def environment(file: Path, at_step: int) -> dict[str, str]:
    """Return the environment of a process that is to be held."""
    return {**os.environ, "HOLD_FILE": str(file), "HOLD_AT": str(at_step)}


def wait_until(what: str, holds: Callable[[], object], runs: Callable[[], bool] = lambda: True, seconds: float = 300) -> None:
    """Wait for something that a process does; fail where that has ended, or nothing happens for so long that it never will."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert runs(), f"it has ended before {what}"
        assert time.monotonic() < deadline, f"no {what} after {seconds:.0f} s"
        time.sleep(0.005)


if __name__ == "__main__":
    hold(Path(os.environ["HOLD_FILE"]), int(os.environ["HOLD_AT"]))
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
