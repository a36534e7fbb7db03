"""Note when a run did its last step, so that a hang can be told from a slow run.

`step.N.json` in the run folder belongs to attempt N. Its modification time is that of the last sign
of progress. It holds what the run does, how long a step usually takes, after how many seconds without
progress the run hangs, and when its first and its last step were done.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cnnjepa.run.attempts import numbered
from cnnjepa.run.files import read_json
from cnnjepa.run.typed import build

SHORTEST_SECONDS = 600.0  # without a step, before a run counts as hung
_STEPS, _LONGEST = 100, 10  # so many usual steps, or times the longest step, are no hang
# Phases have clocks of their own: the first step compiles, and a probe may read a large set.
STARTING_SECONDS, PROBE_SECONDS, SAVING_SECONDS = 3600.0, 4 * 3600.0, 2 * 3600.0
_TOUCH_SECONDS = 1.0


@dataclass(frozen=True)
class Beat:
    """The last sign of progress of a run."""

    phase: str
    usual: float  # seconds of a step, 0 before the first
    limit: float  # seconds without progress
    time: float = 0.0  # of the sign, seconds since 1970
    began: float = 0.0  # when this attempt did its first step, seconds since 1970, 0 before it
    stepped: float = 0.0  # when it did its last step before `phase`, 0 without one

    @property
    def last_step(self) -> float:
        """Return when the last step was done, in seconds since 1970, or 0 without one."""
        return self.time if self.phase == "training" and self.began else self.stepped

    def line(self, now: float) -> str:
        """Return 'no step for 43 min, usually 0.8 s' for a time in seconds since 1970."""
        what = "step" if self.phase == "training" else f"progress while {self.phase}"
        usually = f", usually {self.usual:.2g} s" if self.usual else ""
        return f"no {what} for {_shown(max(now - self.time, 0.0))}{usually}"

    def is_late(self, now: float) -> bool:
        """Return whether a person would want to know: a tenth of the limit has passed."""
        return now - self.time > max(self.limit / 10, _LONGEST * self.usual)


def _shown(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def file_of(run: Path, attempt: int) -> Path:
    """Return the file of an attempt."""
    return numbered(run / "step.json", attempt)


def read(file: Path) -> Beat | None:
    """Return the last sign of progress, or None if there is no file or it is being written."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return build(Beat, {**read_json(file), "time": file.stat().st_mtime})
    return None


class Pace:
    """Writer of the file, on the main rank only. Disk errors are ignored."""

    def __init__(
        self, run: Path, attempt: int, hang_minutes: float = 0.0, is_main: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Take the run folder and the minutes without a step that are a hang; 0 derives them."""
        self._file, self._hang, self._is_main, self._clock = file_of(run, attempt), 60 * hang_minutes, is_main, clock
        self._usual = self._longest = 0.0
        self._began = self._stepped = 0.0
        self._written: Beat | None = None
        self._last = self._touched = clock()

    @property
    def step_limit(self) -> float:
        """Return the seconds without a step after which the run hangs."""
        return self._hang or max(SHORTEST_SECONDS, _STEPS * self._usual, _LONGEST * self._longest)

    def begin(self, phase: str, limit: float) -> None:
        """Note the begin of a phase that has no steps, and its limit in seconds."""
        self._write(phase, limit)

    @contextlib.contextmanager
    def within(self, phase: str, limit: float) -> Iterator[None]:
        """Give the block a clock of its own."""
        self.begin(phase, limit)
        yield
        self.train()

    def train(self) -> None:
        """Note that steps follow."""
        first = not self._usual
        self._write("starting" if first else "training", max(STARTING_SECONDS * first, self.step_limit))

    def step(self) -> None:
        """Note a step. This costs one system call a second at most."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        self._stepped = time.time()
        self._began = self._began or self._stepped
        first = self._written is None or self._written.phase != "training"
        if not first:  # the first step of all, and the one after a probe, hold more than a step
            self._longest = max(self._longest, seconds)
            self._usual += (seconds - self._usual) * (0.1 if self._usual else 1.0)
        known = self._written is not None and self._written.usual > 0
        if first or not known or (now - self._touched >= _TOUCH_SECONDS and self._is_old()):
            self._write("training", self.step_limit)
        elif now - self._touched >= _TOUCH_SECONDS:
            self.touch()

    def _is_old(self) -> bool:
        """Return whether what is written is far from what is known now."""
        assert self._written is not None
        before, now = self._written, self.step_limit
        return not 0.5 < self._usual / before.usual < 2 or not 0.8 < now / before.limit < 1.25

    def touch(self) -> None:
        """Note progress now."""
        self._touched = self._clock()
        if self._is_main:
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def _write(self, phase: str, limit: float) -> None:
        beat = Beat(phase, self._usual, limit, began=self._began, stepped=self._stepped)
        self._written, self._last, self._touched = beat, self._clock(), self._clock()
        if self._is_main:
            with contextlib.suppress(OSError):
                # Without a sync: the file says nothing that must outlive the machine.
                beside = self._file.with_name(f".{self._file.name}.{os.getpid()}.tmp")
                beside.write_text(json.dumps({k: v for k, v in asdict(beat).items() if k != "time"}))
                os.replace(beside, self._file)
