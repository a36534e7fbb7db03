"""Exit statuses, stop signals and path checks that every command shares. Imports no torch."""

import contextlib
import errno
import os
import shlex
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cnnjepa.run.command_line import Parser as Parser
from cnnjepa.run.command_line import printable as printable

INTERRUPTED = 130  # exit status of a command that was stopped and has saved
# The same for a rank. srun passes on the highest status; a signal gives at most 128 + 64.
STOPPED = 200
MOVED = 201  # of a rank whose node is at fault: the job is to run elsewhere
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What to do about an error of the operating system.
_REMEDIES = dict.fromkeys(_FULL, "free space there and type the command again")
_REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it accessible to you, or choose another folder")
_REMEDIES |= dict.fromkeys((errno.ENOENT, errno.ESTALE), "it was removed meanwhile: type the command again")
_REMEDIES |= dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "move what is in its place away")
_REMEDIES |= dict.fromkeys((errno.EMFILE, errno.ENFILE), "close other programs, or raise the limit of open files (ulimit -n)")


def line_of(error: BaseException) -> str:
    """Return one line about an error: for one of the operating system, its file and what to do."""
    if isinstance(error, OSError) and error.strerror:
        remedy = _REMEDIES.get(error.errno or 0, "type the command again")
        said = f"{error.filename2 or error.filename or 'a file'} must be accessible; got {error.strerror}: {remedy}"
    elif isinstance(error, (ValueError, OSError, RuntimeError)) and str(error):
        said = str(error)
    else:
        last = traceback.extract_tb(error.__traceback__)[-1:]
        where = "".join(f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in last)
        said = f"{type(error).__name__}: {error}{where}, a bug, or a file that something else has changed"
    return printable(" ".join(said.splitlines()))


class ExitedError(RuntimeError):
    """Raised where a run has left its process, as with sys.exit(0), though nothing had asked it to stop."""


class _Begun:
    """Whether the command has started what it is for."""

    yes = False


def begun() -> None:
    """Note that from now on an error is one of what was started, and no wrong usage: status 1."""
    _Begun.yes = True


class _Output:
    """Standard output that goes on without its reader: to `head`, a closed pipe is no error."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; discard it if the reader has closed the pipe."""
        with self._forgiving():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush; do nothing if the reader has closed the pipe."""
        with self._forgiving():
            self._stream.flush()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def exit_status(command: Callable[[], int]) -> int:
    """Run a command; return its exit status. An error becomes one line: status 2 before `begun`, then 1."""
    _Begun.yes, out = False, sys.stdout
    sys.stdout = _Output(out)
    try:
        return command()
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
        with contextlib.suppress(BrokenPipeError):
            print(f"error: {line_of(error)}", file=sys.stderr)
        return 1 if _Begun.yes else 2
    finally:
        sys.stdout.flush()
        sys.stdout = out


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


def require_creatable(folder: Path, key: str) -> None:
    """Raise ValueError unless `folder`, which may be missing, could be written to; create nothing."""
    require_printable(str(folder), key)
    try:
        there = folder
        while not there.exists() and not there.is_symlink():
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        said = os.strerror(errno.EEXIST) if error.errno == errno.ENOTDIR else error.strerror
        raise ValueError(f"{key} must be a folder that can be written; got {folder}: {said}") from error


@contextmanager
def for_now(folder: Path) -> Iterator[None]:
    """Remove `folder` after the block, and the folders above it, if they were missing before and are empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def resolved(path: Path, key: str) -> Path:
    """Return `path` absolute, without links and without ~ for a home; raise ValueError at a loop of links."""
    require_printable(str(path), key)
    try:
        return Path(os.path.expanduser(path)).resolve()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{key} must be a path that can be resolved; got {path}: {error}") from error


def require_printable(text: str, key: str) -> None:
    """Raise ValueError at a line break or the like, which would break a script or a table."""
    if not text.isprintable():
        raise ValueError(f"{key} must hold only printable characters; got {text!r}")
