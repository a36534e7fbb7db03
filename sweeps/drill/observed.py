"""Observe a drilled run from outside, by its files alone, as a person on a login node does."""

import json
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnjepa.run import checkpoint
from cnnjepa.run.attempts import newest
from cnnjepa.run.files import tail
from cnnjepa.run.folder import RunFolder

_TAIL_BYTES = 4096


class NoTargetError(RuntimeError):
    """A fault found no target: the run has ended or is about to start."""


@dataclass(frozen=True)
class WatchedRun:
    """A run's folder, opened for reading only."""

    path: Path

    def step(self) -> int:
        """Return the last optimiser step on record."""
        try:
            found = re.findall(rb'"kind": "step", "step": (\d+)[^\n]*\n', tail(RunFolder(self.path).records, _TAIL_BYTES))
        except FileNotFoundError:
            return 0
        return int(found[-1]) if found else 0

    def saved_step(self) -> int:
        """Return the step of the newest checkpoint, or -1."""
        found = checkpoint.find(self.path / "checkpoints")
        return found[0].step if found else -1

    def claim(self) -> dict[str, Any]:
        """Return the newest claim, or {} if the run has not begun."""
        names = sorted((self.path / "claim").glob("*.json")) if (self.path / "claim").is_dir() else []
        found: dict[str, Any] = json.loads(names[-1].read_text()) if names else {}
        return found

    def attempt(self) -> int:
        """Return the attempt of the newest claim, or 0 if the run has not begun."""
        return int(self.claim().get("epoch", 0))

    def claim_file(self, attempt: int) -> Path:
        """Return the file that records the claim of an attempt."""
        return self.path / "claim" / f"{attempt:06d}.json"

    def has_let_go(self, attempt: int) -> bool:
        """Return whether the owner of an attempt has recorded that it stopped."""
        return any(self.claim_file(attempt).with_suffix(f".{way}").exists() for way in ("released", "crashed"))

    def gained(self) -> bool:
        """Return whether the present owner has saved a step.

        A run that dies twice without doing so is rightly marked failed.
        """
        return bool(self.claim()) and self.saved_step() > int(self.claim()["step"])

    def ended(self) -> bool:
        """Return whether the run has a result."""
        return RunFolder(self.path).result() is not None

    def seconds_a_step(self) -> float:
        """Return the median seconds per step."""
        folder = RunFolder(self.path)
        pace = [r["images_per_second"] for r in folder.metrics() if r["kind"] == "step"]
        return float(folder.config().global_batch_size / statistics.median(pace))

    def log_size(self) -> int:
        """Return the size of the run's log in bytes."""
        log = newest(self.path / "log" / "train.log")
        return log.stat().st_size if log.exists() else 0

    def resumed_at(self, log_start: int) -> int | None:
        """Return the step of the last resume logged after `log_start` bytes, or None."""
        with open(newest(self.path / "log" / "train.log"), "rb") as file:
            file.seek(log_start)
            found = re.findall(rb"resuming \w+ at step (\d+) of", file.read())
        return int(found[-1]) if found else None


def wait_for(what: str, holds: Any, seconds: float, pause: float = 0.05) -> None:
    """Wait until `holds()`; raise TimeoutError with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(pause)
