"""What a run has reported and saved, and where two runs differ."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnnjepa.run.folder import TIMING_KEYS
from jobs.resuming.conditions import SHIFT_SECONDS, SPEED

# What a checkpoint of this project notes of its own files and attempts.
_NOTES = ("records", "resumes")
_PLAIN = (bool, int, float, str, type(None))


def flat(state: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of a saved state by their path, such as optimizer.state.0.exp_avg."""
    if isinstance(state, Mapping):
        if not path and set(state) == {"state"}:
            return flat(state["state"])
        parts: Iterator[tuple[Any, Any]] = ((k, v) for k, v in state.items() if path or k not in (*_NOTES, *TIMING_KEYS))
    elif isinstance(state, (list, tuple)) and not all(isinstance(v, _PLAIN) for v in state):
        parts = iter(enumerate(state))
    else:
        return {path: state}
    return {name: leaf for key, value in parts for name, leaf in flat(value, f"{path}.{key}" if path else str(key)).items()}


@dataclass(frozen=True)
class Difference:
    """A value that is not that of the undisturbed run."""

    step: int  # epoch or step of the report, or of the save
    name: str
    ours: Any
    theirs: Any
    saved: bool = False  # whether it is of a saved state

    @property
    def text(self) -> str:
        """Return it in words, with its size where it has one."""
        where = "in the state saved at" if self.saved else "reported at"
        if isinstance(self.ours, str) and isinstance(self.theirs, str) and self.saved:
            return f"{self.name} differs {where} {self.step}"
        size = ""
        if isinstance(self.ours, float) and isinstance(self.theirs, float):
            size = f" (difference {abs(self.ours - self.theirs):.2g})"
        return f"{self.name}, {where} {self.step}: {_short(self.ours)} instead of {_short(self.theirs)}{size}"


def _short(value: Any) -> str:
    return "nothing" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass
class Outcome:
    """What was seen of one run, in all its processes."""

    metrics: dict[int, dict[str, Any]] = field(default_factory=dict)  # epoch or step -> metric -> value
    states: dict[int, dict[str, Any]] = field(default_factory=dict)  # save -> path -> value, or checksum of an array
    lines: dict[int, list[tuple[str, int]]] = field(default_factory=dict)  # save, or START -> lines of the program run after it
    restored_at: str = ""  # line of the program that read the state
    saved_at: str = ""
    ended: str = ""  # completed, stopped, or the cause of a failure

    def read(self, events: Path) -> None:
        """Add the events of a process."""
        for text in events.read_text().splitlines():
            event = json.loads(text)
            if "metrics" in event:
                kept = self.metrics.setdefault(event["report"], {})
                kept.update(event["metrics"])
            elif "state" in event:
                self.states[event["save"]] = event["state"]
                self.saved_at = event["where"] or self.saved_at
            elif "lines" in event:
                self.lines[event["after"]] = [(file, line) for file, line in event["lines"]]
            elif "read" in event:
                self.restored_at = event["where"]
            elif "ended" in event:
                self.ended = event["ended"]


def same(a: Any, b: Any) -> bool:
    """Return whether two plain values are equal; a value that is not a number equals itself."""
    return bool(a == b) or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def differences(ours: Outcome, theirs: Outcome, leave_out: frozenset[str] = frozenset()) -> list[Difference]:
    """Return where two runs differ, in order: what was reported, then the first saved state that differs."""
    found = []
    for step in sorted(ours.metrics.keys() | theirs.metrics.keys()):
        a, b = ours.metrics.get(step, {}), theirs.metrics.get(step, {})
        for name in sorted(a.keys() | b.keys(), key=lambda n: (list(b).index(n) if n in b else len(b), n)):
            if name not in leave_out and not same(a.get(name), b.get(name)):
                found.append(Difference(step, name, a.get(name), b.get(name)))
    for save in sorted(ours.states.keys() & theirs.states.keys()):
        a, b = ours.states[save], theirs.states[save]
        wrong = [Difference(save, k, a.get(k), b.get(k), saved=True) for k in sorted(a.keys() | b.keys()) if not same(a.get(k), b.get(k))]
        found += [d for d in wrong if f"saved {d.name}" not in leave_out]
        if found and found[-1].saved:
            break
    if theirs.states and (not ours.states or max(ours.states) != max(theirs.states)):
        found.append(Difference(max(theirs.states), "the last save", max(ours.states, default=None), max(theirs.states), saved=True))
    return found


def measured_times(normal: Outcome, hurried: Outcome) -> frozenset[str]:
    """Return the names of values that measure time: they differ as the clocks of two runs do, in each place.

    They are the only values that may differ between two undisturbed runs.
    """
    pairs: dict[str, list[tuple[Any, Any]]] = {}
    for step in normal.metrics.keys() & hurried.metrics.keys():
        for name in normal.metrics[step].keys() & hurried.metrics[step].keys():
            pairs.setdefault(name, []).append((normal.metrics[step][name], hurried.metrics[step][name]))
    for save in normal.states.keys() & hurried.states.keys():
        for name in normal.states[save].keys() & hurried.states[save].keys():
            pairs.setdefault(f"saved {name}", []).append((normal.states[save][name], hurried.states[save][name]))
    return frozenset(name for name, values in pairs.items() if any(not same(a, b) for a, b in values) and _are_times(values))


def _are_times(values: list[tuple[Any, Any]]) -> bool:
    return all(same(a, b) or (_is_number(a) and _is_number(b) and _is_time(float(a), float(b))) for a, b in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_time(normal: float, hurried: float) -> bool:
    """Return whether a value follows the clock: a duration, a rate per second, or a time of day."""
    low, high = SPEED / 30, SPEED * 30
    if normal and hurried:
        ratio = abs(hurried / normal)
        if low < ratio < high or low < 1 / ratio < high:
            return True
    return 0.5 * SHIFT_SECONDS < hurried - normal < 2 * SHIFT_SECONDS or (not normal and 0 < hurried < 600 * SPEED)
