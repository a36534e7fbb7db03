"""Find out from outside whether the run of a job still makes progress.

The rank that owns a trial writes to `log/JOB.run` of the sweep which file tells of its steps: see
cnnjepa/run/pace.py. Time is measured here, from one change of that file to the next.
"""

import contextlib
import faulthandler
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cnnjepa.run import pace

# On SIGVTALRM a rank writes the stacks of its threads to the job's log, and ends. No library uses it.
DUMP_SIGNAL = 26
_LOOK_SECONDS = 5.0


def pointer(sweep: Path, job: str) -> Path:
    """Return the file that names what a job runs now."""
    return sweep / "log" / f"{job}.run"


@contextlib.contextmanager
def watched(file: Path, run: Path, attempt: int) -> Iterator[None]:
    """Let the job's supervisor watch an attempt within the block."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(pace.file_of(run, attempt)))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def stacks_to(file: TextIO) -> Iterator[None]:
    """Let DUMP_SIGNAL write the stacks of all threads to `file`, and end the process, within the block.

    This needs no help of Python: the main thread may hang in C.
    """
    faulthandler.register(DUMP_SIGNAL, file, all_threads=True, chain=True)
    try:
        yield
    finally:
        faulthandler.unregister(DUMP_SIGNAL)


class Silence:
    """Times how long the files of runs stand still, by this machine's clock."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[pace.Beat | None, float]] = {}

    def of(self, file: Path) -> tuple[pace.Beat | None, float]:
        """Return what the file holds, and since when."""
        beat = pace.read(file)
        if file not in self._seen or self._seen[file][0] != beat:
            self._seen[file] = beat, time.monotonic()
        return self._seen[file]


def hang(beat: pace.Beat | None, since: float) -> str:
    """Return what is wrong with a run that has made no progress since then, or ""."""
    silent = time.monotonic() - since
    return "" if beat is None or silent <= beat.limit else beat.line(beat.time + silent)


class StepWatch:
    """Watches the run that a pointer names, in a thread: a file system that blocks may block it."""

    def __init__(self, file: Path, look_seconds: float = _LOOK_SECONDS) -> None:
        """Start to watch."""
        self._pointer, self._every, self._silence = file, look_seconds, Silence()
        self._seen: tuple[Path, pace.Beat | None, float] | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._keep_looking, daemon=True).start()

    def _keep_looking(self) -> None:
        while not self._ended.wait(self._every):
            self._look()

    def _look(self) -> None:
        found = None
        with contextlib.suppress(OSError):
            step_file = Path(self._pointer.read_text())
            found = step_file, *self._silence.of(step_file)
        self._seen = found

    def close(self) -> None:
        """End the watch."""
        self._ended.set()

    def hung(self) -> tuple[str, int, str]:
        """Return the run ID, the attempt and what is wrong if the run hangs, else three empty values."""
        if (seen := self._seen) is None or not (cause := hang(*seen[1:])):
            return "", 0, ""
        return seen[0].parent.name, int(seen[0].stem.rpartition(".")[2]), cause
