"""Build report.html in a separate process; the one that watches the sweep stays light."""

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
    """Build the page now; return "", or on failure the reason in one line. Never raise."""
    try:
        done = subprocess.run(_command(folder), cwd=_ROOT, capture_output=True, text=True, timeout=_MADE_WITHIN_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return said[-1].removeprefix("error: ") if done.returncode else ""


class Rebuilding:
    """Runs one low-priority `python -m sweeps report` at a time, if something has changed."""

    def __init__(self, folder: Path, first_seconds: float = FIRST_SECONDS, every_seconds: float = EVERY_SECONDS) -> None:
        self._folder = folder
        self._every, self._next = every_seconds, time.monotonic() + first_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._shown = ""

    def look(self, state: str) -> None:
        """Start a new page if it is time and `state` differs from the last page's."""
        if self._process is not None and self._process.poll() is None:
            return
        if time.monotonic() < self._next or state == self._shown:
            return
        self._shown, self._next = state, time.monotonic() + self._every
        with contextlib.suppress(OSError):  # the sweep does not need the page
            quiet = subprocess.DEVNULL
            command = _command(self._folder)
            self._process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True, cwd=_ROOT)
            os.setpriority(os.PRIO_PROCESS, self._process.pid, 10)

    def close(self) -> None:
        """End the process. A half-built page is discarded."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(_ENDS_WITHIN_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
