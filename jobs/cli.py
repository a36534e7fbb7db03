"""What every command shares, and no torch: exit statuses, folders that can be written, and signals that ask it to stop."""

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cnnjepa.run.command_line import Parser as Parser

INTERRUPTED = 130  # exit status of a command that was stopped and has saved
# The same of a rank under srun, which passes on the highest status of its tasks: above that of any error, and of any signal that ended
# the other ranks (at most 128 + 64).
STOPPED = 200


class Stop:
    """True once a signal has asked the process to stop; `cause` names the first one."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return bool(self.received)

    @property
    def cause(self) -> str:
        """'SIGTERM', or '' where no signal came."""
        return signal.Signals(self.received[0]).name if self.received else ""


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Within the block SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 make the yielded Stop true; a second SIGINT interrupts at once."""
    stop = Stop()

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in stop.received:
            raise KeyboardInterrupt
        stop.received.append(number)
        # Not print: the signal may have come in the middle of one, which cannot be entered twice.
        os.write(2, f"{signal.Signals(number).name}: saving a checkpoint, then stopping\n".encode())

    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require_writable(folder: Path, key: str) -> None:
    """Raise ValueError unless files can be made in `folder`, which is created where it is missing."""
    require_printable(str(folder), key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{key} must be a folder that can be written; got {folder}: {error.strerror}") from error


def resolved(path: Path, key: str) -> Path:
    """The absolute path without links; raises ValueError at one that leads nowhere, such as a loop of links."""
    require_printable(str(path), key)
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{key} must be a path that can be resolved; got {path}: {error}") from error


def require_printable(text: str, key: str) -> None:
    """Raise ValueError at a line break or another character that cannot be seen: it would end a line of a script, a table or a log."""
    if not text.isprintable():
        raise ValueError(f"{key} must hold only printable characters; got {text!r}")
