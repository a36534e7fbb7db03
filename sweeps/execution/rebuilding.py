"""Makes report.html in a process of its own, also now and then while a sweep runs: who watches a sweep stays light, and outlives it."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

FIRST_SECONDS, EVERY_SECONDS = 60.0, 300.0
_ENDS_WITHIN_SECONDS = 5.0


_ROOT = Path(__file__).resolve().parents[2]
_MADE_WITHIN_SECONDS = 900.0


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "sweeps", "report", str(folder)]


def rebuild(folder: Path) -> str:
    """Make the page now; why it could not be made in one line, "" where it was. What happens to it is no matter for the sweep."""
    try:
        done = subprocess.run(_command(folder), cwd=_ROOT, capture_output=True, text=True, timeout=_MADE_WITHIN_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return said[-1].removeprefix("error: ") if done.returncode else ""


class Rebuilding:
    """Starts `python -m sweeps report` now and then, when something has changed; one at a time, behind all other work."""

    def __init__(self, folder: Path, first_seconds: float = FIRST_SECONDS, every_seconds: float = EVERY_SECONDS) -> None:
        """The first page comes after `first_seconds`."""
        self._folder = folder
        self._every, self._next = every_seconds, time.monotonic() + first_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._told = ""

    def look(self, told: str) -> None:
        """Begin a new page where it is time and `told`, which says how things stand, differs from what the last page was made of."""
        if self._process is not None and self._process.poll() is None:
            return
        if time.monotonic() < self._next or told == self._told:
            return
        self._told, self._next = told, time.monotonic() + self._every
        with contextlib.suppress(OSError):  # the page is but a view
            quiet = subprocess.DEVNULL
            command = _command(self._folder)
            self._process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True, cwd=_ROOT)
            os.setpriority(os.PRIO_PROCESS, self._process.pid, 10)

    def close(self) -> None:
        """Leave no process behind; a page half made is none."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(_ENDS_WITHIN_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
