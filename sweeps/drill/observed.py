"""What can be seen of a drilled run from outside: its files alone, as a person on a login node sees them."""

import json
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunFolder, RunResult

_TAIL_BYTES = 4096


class NothingToStrikeError(RuntimeError):
    """What was to be struck is not there now: the run has ended, or is about to start."""


@dataclass(frozen=True)
class WatchedRun:
    """One run's folder; nothing in it is written here."""

    path: Path

    def step(self) -> int:
        """The last optimiser step that was recorded."""
        metrics = self.path / "metrics.jsonl"
        try:
            with open(metrics, "rb") as file:
                file.seek(max(metrics.stat().st_size - _TAIL_BYTES, 0))
                found = re.findall(rb'"kind": "step", "step": (\d+)[^\n]*\n', file.read())
        except FileNotFoundError:
            return 0
        return int(found[-1]) if found else 0

    def saved_step(self) -> int:
        """Of the newest checkpoint, -1 where there is none."""
        found = checkpoint.find(self.path / "checkpoints")
        return found[0].step if found else -1

    def claim(self) -> dict[str, Any]:
        """The newest claim, {} where nobody has begun."""
        names = sorted((self.path / "claim").glob("*.json")) if (self.path / "claim").is_dir() else []
        found: dict[str, Any] = json.loads(names[-1].read_text()) if names else {}
        return found

    def epoch(self) -> int:
        """Of the newest claim, 0 where nobody has begun."""
        return int(self.claim().get("epoch", 0))

    def gained(self) -> bool:
        """Whether its present owner has saved a step: one that dies twice without is failed, and rightly."""
        return bool(self.claim()) and self.saved_step() > int(self.claim()["step"])

    def result(self) -> RunResult | None:
        """How it ended."""
        return RunFolder(self.path).result()

    def ended(self) -> bool:
        """Whether it has a result."""
        return (self.path / "result.json").exists()

    def seconds_a_step(self) -> float:
        """The median over all steps."""
        folder = RunFolder(self.path)
        pace = [r["images_per_second"] for r in folder.metrics() if r["kind"] == "step"]
        return float(folder.config().global_batch_size / statistics.median(pace))

    def log_size(self) -> int:
        """Bytes that the run has printed."""
        log = self.path / "log" / "train.log"
        return log.stat().st_size if log.exists() else 0

    def resumed_at(self, log_start: int) -> int | None:
        """The step from which it was taken up last, in what it printed after `log_start` bytes; None where it was not."""
        with open(self.path / "log" / "train.log", "rb") as file:
            file.seek(log_start)
            found = re.findall(rb"resuming \w+ at step (\d+) of", file.read())
        return int(found[-1]) if found else None


def wait_for(what: str, holds: Any, seconds: float, pause: float = 0.05) -> None:
    """Until `holds()`; raises TimeoutError that names `what`."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(pause)
