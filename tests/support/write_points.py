"""The seam for kills at a chosen moment: a process that counts its write points, and kills itself -9 at one of them.

A write point comes before each change of a name or a file under one folder, before each program that is started, and amid each line
that is appended to metrics.jsonl. Python's audit hooks tell of them, so that no writer can be forgotten, and the code that is tested holds
nothing of it.
"""

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnnjepa.run.folder import RunFolder

_CHANGES = {"os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.utime"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PASSED = "points"


class WritePoints:
    """Counts the write points of this process under `folder`; at number `kill_at` it is killed, 0 kills never."""

    def __init__(self, folder: Path, kill_at: int) -> None:
        self.folder, self.kill_at, self.count = str(folder), kill_at, itertools.count(1)
        self.passed = 0

    def pass_one(self, torn: Callable[[], object] = lambda: None) -> None:
        """One point; `torn` does half of what follows."""
        self.passed = next(self.count)
        if self.passed == self.kill_at:
            torn()
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Python's word on what is about to happen."""
        if event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING):
            if any(isinstance(a, (str, os.PathLike)) and os.fspath(a).startswith(self.folder) for a in arguments[:2]):
                self.pass_one()
        elif event == "subprocess.Popen":
            self.pass_one()

    def install(self) -> None:
        """For the rest of this process."""
        sys.addaudithook(self.audit)
        record = RunFolder.record

        def synced(descriptor: int) -> None:
            # Not done: a killed process loses nothing that it had handed to the kernel, and hundreds of runs would wait for the disk.
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            halved = os.fstat(descriptor).st_size // 2 if name.endswith(".tmp") else None
            if name.startswith(self.folder):
                self.pass_one(lambda: None if halved is None else os.ftruncate(descriptor, halved))

        def recorded(run: RunFolder, kind: str, step: int, values: dict[str, Any]) -> None:
            path = run._metrics
            before = path.stat().st_size

            def half() -> None:
                record(run, kind, step, values)
                os.truncate(path, before + (path.stat().st_size - before) // 2)

            self.pass_one()
            self.pass_one(half)
            record(run, kind, step, values)

        os.fsync = synced
        RunFolder.record = recorded  # type: ignore[method-assign]


def start(work: Callable[[], int], folder: Path, kill_at: int, said: Path) -> int:
    """A child of this process that does `work`, prints into `said`, and ends with its status; returns the child's number."""
    child = os.fork()
    if child:
        return child
    status = 99
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        points = WritePoints(folder, kill_at)
        points.install()
        status = work()
        print(f"{PASSED} {points.passed}", flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def end_of(child: int) -> int:
    """The child's exit status, -9 where it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(work: Callable[[], int], folder: Path, kill_at: int, said: Path) -> int:
    """The exit status of `work` in a child, -9 where it came to point `kill_at`."""
    status = end_of(start(work, folder, kill_at, said))
    assert status in (0, -signal.SIGKILL), said.read_text()[-3000:]
    if status == -signal.SIGKILL:
        assert kill_at, "nobody else kills it"
    return status


def points_of(said: Path) -> int:
    """How many write points the last child that ended had passed."""
    return int(next(line for line in reversed(said.read_text().splitlines()) if line.startswith(PASSED)).split()[1])
