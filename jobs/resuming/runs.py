"""Start the watched runs of a drill: each in a folder of its own, undisturbed or from where another was killed."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.resuming.outcome import Outcome
from jobs.resuming.own_files import ROOT
from jobs.resuming.watch import Plan

KILLED = -9
# Starts `python *words` with an environment and a time limit in seconds, and returns exit status and output.
Start = Callable[[Sequence[str], Mapping[str, str], float], tuple[int, str]]


class ProgramError(RuntimeError):
    """Raised when an undisturbed run fails: there is nothing to compare with."""


def too_long(limit_seconds: float) -> str:
    """Return what is wrong with a run that does not end."""
    return f"a run must end within {limit_seconds:g} s; got no end: raise --time-limit, or train less"


def start_python(words: Sequence[str], environment: Mapping[str, str], limit_seconds: float) -> tuple[int, str]:
    """Run a Python program in a process of its own."""
    line = [sys.executable, *words]
    try:
        done = subprocess.run(
            line, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit_seconds, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(too_long(limit_seconds)) from error
    return done.returncode, done.stdout


@dataclass
class Done:
    """A process that has ended, or was killed."""

    folder: Path
    outcome: Outcome
    status: int
    output: str
    looks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def killed(self) -> bool:
        """Return whether it was killed at the moment of its plan."""
        return self.status in (KILLED, 128 + 9)

    @property
    def run(self) -> Path:
        """Return its run folder."""
        return self.folder / "run"


@dataclass
class Runs:
    """The runs of one task in one folder."""

    folder: Path
    task: str
    overrides: Sequence[str]
    path: Sequence[str]  # folders from which the program is imported
    start: Start = start_python
    limit_seconds: float = 600.0
    count: int = 0

    def __call__(
        self, name: str, plan: Plan | None = None, after: Done | None = None, hashing: int = 0, conditions: Mapping[str, Any] | None = None
    ) -> Done:
        """Run the task in a new process, resuming where `after` has ended if that is given."""
        self.count += 1
        folder = self.folder / f"{self.count:03d}-{name}"
        folder.mkdir(parents=True)
        if after is not None:
            shutil.copytree(after.run, folder / "run", symlinks=True)
        plan = dataclasses.replace(plan or Plan(), values=str(folder / "looks.pkl"))
        events = folder / "events.jsonl"
        spec: dict[str, Any] = {
            "task": self.task,
            "run": str(folder / "run"),
            "events": str(events),
            "overrides": list(self.overrides),
            "path": list(self.path),
            "plan": dataclasses.asdict(plan),
            "conditions": dict(conditions or {}),
        }
        for moment in ("kill", "stop", "look"):
            if (at := getattr(plan, moment)) is not None:
                spec["plan"][moment] = [at.save, at.line]
        (folder / "spec.json").write_text(json.dumps(spec))
        path = os.pathsep.join([str(ROOT), *self.path, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONHASHSEED": str(hashing), "PYTHONPATH": path}
        status, output = self.start(["-m", "jobs.resuming.child", str(folder / "spec.json")], environment, self.limit_seconds)
        outcome = Outcome()
        if events.exists():
            outcome.read(events)
        looks = Path(plan.values)
        seen = pickle.loads(looks.read_bytes()) if looks.exists() else []  # noqa: S301, written by the child
        return Done(folder, outcome, status, output, seen)


def joined(first: Done, second: Done) -> Outcome:
    """Return the outcome of a run of two processes: what the second reports takes the place of the first's."""
    found = Outcome(lines=second.outcome.lines, restored_at=second.outcome.restored_at, saved_at=second.outcome.saved_at)
    found.ended = second.outcome.ended
    for part in (first.outcome, second.outcome):
        for step, values in part.metrics.items():
            found.metrics[step] = dict(values)
        found.states.update(part.states)
    return found
