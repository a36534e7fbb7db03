"""Find out from outside whether the run of a job still makes progress.

The rank that owns a trial writes to `log/JOB.run` of the sweep which file tells of its steps: see
cnnjepa/run/pace.py. Time is measured here, from one change of that file to the next.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

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


class StepWatch:
    """Watches the run that a pointer names, in a thread: a file system that blocks may block it."""

    def __init__(self, file: Path, look_seconds: float = _LOOK_SECONDS) -> None:
        """Start to watch."""
        self._pointer, self._every = file, look_seconds
        self._seen: tuple[Path, pace.Beat] | None = None
        self._since = time.monotonic()
        self._ended = threading.Event()
        threading.Thread(target=self._keep_looking, daemon=True).start()

    def _keep_looking(self) -> None:
        while not self._ended.wait(self._every):
            self._look()

    def _look(self) -> None:
        found = None
        with contextlib.suppress(OSError):
            step_file = Path(self._pointer.read_text())
            beat = pace.read(step_file)
            found = None if beat is None else (step_file, beat)
        if found != self._seen:
            self._seen, self._since = found, time.monotonic()

    def close(self) -> None:
        """End the watch."""
        self._ended.set()

    def hung(self) -> tuple[str, int, str]:
        """Return the run ID, the attempt and what is wrong if the run hangs, else three empty values."""
        seen, silent = self._seen, time.monotonic() - self._since
        if seen is None or silent <= seen[1].limit:
            return "", 0, ""
        step_file, beat = seen
        return step_file.parent.name, int(step_file.stem.rpartition(".")[2]), beat.line(beat.time + silent)
