"""End the workers of Ray whose runs hang; the driver looks at all of them now and then.

A worker that is told to end writes the stacks of its threads to the log of its run. Ray starts
another one in its place.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from cnnjepa.run import pace
from jobs.slurm.hangs import DUMP_SIGNAL, Silence, hang
from jobs.slurm.nodes import Fault, FaultKind, Nodes
from sweeps.state.claims import Claim
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

_LOOK_SECONDS = 5.0
_PREFIX = "hung-"  # of a file that tells a node which of its processes to end


def end_process(pid: int) -> None:
    """Let a process of this node write its stacks and end. A stopped one continues first."""
    with contextlib.suppress(OSError):
        os.kill(pid, DUMP_SIGNAL)
        os.kill(pid, signal.SIGCONT)


def tell_node(folder: Path, node: str, pid: int) -> None:
    """Ask `end_told` on a node to end a process."""
    (folder / f"{_PREFIX}{node}-{pid}").touch()


def end_told(folder: Path, node: str) -> None:
    """End the processes of this node that `tell_node` named."""
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(f"{_PREFIX}{node}-"):
                (folder / name).unlink(missing_ok=True)
                end_process(int(name.rpartition("-")[2]))


class HungWorkers:
    """Finds runs of one driver that hang, and ends each attempt once."""

    def __init__(self, driver: str, end: Callable[[Claim], None], nodes: Nodes | None = None) -> None:
        """Take the driver, how to end an owner, and where to record hangs on Slurm's nodes."""
        self._driver, self._end, self._nodes = driver, end, nodes
        self._silence, self._ended, self._next = Silence(), set[Path](), 0.0

    def look(self, view: View) -> list[str]:
        """Return a line for each run that was found to hang now."""
        if time.monotonic() < self._next:
            return []
        self._next, lines = time.monotonic() + _LOOK_SECONDS, []
        for trial in view.sweep.trials:
            last = next(iter(view.claims(trial)[-1:]), None) if view.state(trial) is TrialState.running else None
            if last is None or last.driver != self._driver:
                continue
            file = pace.file_of(view.sweep.trial_dir(trial), last.attempt)
            cause = "" if file in self._ended else hang(*self._silence.of(file))
            if not cause:
                continue
            self._ended.add(file)
            if self._nodes is not None and last.slurm is not None:
                where = [last.slurm.node]
                self._nodes.record(Fault(trial.signature, last.attempt, last.slurm.job, where, FaultKind.hang, cause, time.time()))
            self._end(last)
            lines.append(f"{trial.name}: {cause}: the run hangs; its stacks are in its log, and it starts again")
        return lines
