"""Runs a script's parts in turn, each in a process of its own and for a bounded time: what fails is reported, and the others still run."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
_LAST_LINES = 12


@dataclass(frozen=True)
class Part:
    """A command that writes {"figures", "wrong", "said"} to its answer's path; `wrong` holds a line for each check that failed."""

    name: str
    command: Sequence[str]  # without the path of the answer, which is added
    least_seconds: float  # with less time left it is not begun
    most_seconds: float
    needs: tuple[str, ...] = ()  # parts that must have passed


@dataclass
class Outcome:
    """How a part went."""

    outcome: str
    why: str = ""  # one line, of what did not pass
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    last_lines: list[str] = field(default_factory=list)  # of what it printed, where it failed


def end_all(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that it has started, also what has left its session, as torchrun's ranks do; nothing where it has ended."""
    if process.poll() is not None:  # its number may be another's by now
        return
    found: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        found = [parent, *parent.children(recursive=True)]
    for one in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def run_part(part: Part, folder: Path, seconds: float, environment: dict[str, str], cwd: Path) -> Outcome:
    """Run one part for at most so many seconds; whatever becomes of it, nothing of it is left."""
    answer, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
    answer.unlink(missing_ok=True)
    began = time.monotonic()
    with open(log, "wb") as output:
        line = [*part.command, str(answer)]
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, cwd=cwd)
        try:
            status: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end_all(process)
    took = time.monotonic() - began
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-_LAST_LINES:]
    if status is None:
        return Outcome(FAILED, f"ended after {seconds:.0f} s, the time it had", took, last_lines=lines)
    if status or not answer.exists():
        return Outcome(FAILED, lines[-1] if lines else f"ended with status {status} and no word", took, last_lines=lines)
    reported = json.loads(answer.read_text())
    wrong = reported["wrong"]
    return Outcome(FAILED if wrong else PASSED, "; ".join(wrong), took, reported["figures"], reported["said"])


def run_parts(
    parts: Sequence[Part],
    folder: Path,
    deadline: float,
    cwd: Path,
    say: Callable[[str], None],
    more_environment: dict[str, str] | None = None,
) -> dict[str, Outcome]:
    """Run them in turn until `deadline` of time.monotonic; `say` is called when one begins."""
    outcomes: dict[str, Outcome] = {}
    environment = {**os.environ, **(more_environment or {})}
    for part in parts:
        left = deadline - time.monotonic()
        without = [n for n in part.needs if n not in outcomes or outcomes[n].outcome != PASSED]
        if without:
            outcomes[part.name] = Outcome(NOT_RUN, f"{without[0]} has not passed")
        elif left < part.least_seconds:
            outcomes[part.name] = Outcome(NOT_RUN, f"no time left: {max(left, 0):.0f} s, and it needs {part.least_seconds:.0f}")
        else:
            say(part.name)
            outcomes[part.name] = run_part(part, folder, min(left, part.most_seconds), environment, cwd)
    return outcomes
