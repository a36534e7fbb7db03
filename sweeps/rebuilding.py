"""Keeps report.html up to date while a sweep runs, in a process of its own: who watches a sweep stays light."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

FIRST_SECONDS, EVERY_SECONDS = 60.0, 300.0
_ENDS_WITHIN_SECONDS = 5.0


class Rebuilding:
    """Starts `python -m sweeps report` now and then, when something has changed; one at a time, behind all other work."""

    def __init__(self, folder: Path, first_seconds: float = FIRST_SECONDS, every_seconds: float = EVERY_SECONDS) -> None:
        """The first page comes after `first_seconds`."""
        self._command = [sys.executable, "-m", "sweeps", "report", str(folder)]
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
            self._process = subprocess.Popen(
                self._command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True, cwd=Path(__file__).parents[1]
            )
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
