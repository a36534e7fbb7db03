"""Exit statuses, stop signals and path checks that every command shares. Imports no torch."""

import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cnnjepa.run.command_line import Parser as Parser

INTERRUPTED = 130  # exit status of a command that was stopped and has saved
# The same for a rank. srun passes on the highest status; a signal gives at most 128 + 64.
STOPPED = 200
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Stop:
    """Callable that returns True once a signal has asked the process to stop."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __call__(self) -> bool:
        """Return whether a signal has arrived."""
        return bool(self.received)

    @property
    def cause(self) -> str:
        """Return the name of the first signal, such as SIGTERM, or "" if none has arrived."""
        return signal.Signals(self.received[0]).name if self.received else ""


@contextmanager
def handling(handler: Callable[[int, FrameType | None], Any], *numbers: int) -> Iterator[None]:
    """Call `handler` at signals `numbers` inside the `with` block."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Yield a Stop that SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 set; a second SIGINT interrupts."""
    stop = Stop()

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in stop.received:
            raise KeyboardInterrupt
        stop.received.append(number)
        # print is not reentrant, and the signal may have interrupted one.
        os.write(2, f"{signal.Signals(number).name}: saving a checkpoint, then stopping\n".encode())

    with handling(note, *STOP_SIGNALS):
        yield stop


def refused(error: Exception) -> int:
    """Print a mistake in one line; return the exit status of wrong usage."""
    print(f"error: {error}", file=sys.stderr)
    return 2


def scores_later(folder: Path) -> str:
    """Return the line that names the command for the scores that a run or a sweep lacks."""
    return f"python -m jobs.probe {shlex.quote(str(folder))} computes what has no value, without training"


def require_writable(folder: Path, key: str) -> None:
    """Create `folder` if it is missing; raise ValueError unless files can be created in it."""
    require_printable(str(folder), key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{key} must be a folder that can be written; got {folder}: {error.strerror}") from error


def resolved(path: Path, key: str) -> Path:
    """Return `path` absolute and without links; raise ValueError at a loop of links."""
    require_printable(str(path), key)
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{key} must be a path that can be resolved; got {path}: {error}") from error


def require_printable(text: str, key: str) -> None:
    """Raise ValueError at a line break or the like, which would break a script or a table."""
    if not text.isprintable():
        raise ValueError(f"{key} must hold only printable characters; got {text!r}")
