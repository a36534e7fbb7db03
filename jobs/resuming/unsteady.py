"""Find why two undisturbed runs of a program differ: its clock, hashes, or random numbers without a seed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jobs.resuming.kinds import Kind
from jobs.resuming.outcome import Difference, Outcome, differences

# Runs under conditions, and returns what was seen: `run(hashing, conditions)`.
Under = Callable[[int, Mapping[str, Any]], Outcome]
_FIXED: dict[str, Any] = {"clock": 1.7e9, "python": 1, "numpy": 1, "torch": 1, "entropy": 1}
_VARIED: dict[str, tuple[Kind, Any]] = {
    "clock": (Kind.clock, 1.8e9 + 7.0),
    "python": (Kind.unseeded_python, 2),
    "numpy": (Kind.unseeded_numpy, 2),
    "torch": (Kind.unseeded_torch, 2),
    "entropy": (Kind.entropy, 2),
}


@dataclass(frozen=True)
class Unsteady:
    """What changes the result of a run that nothing has disturbed, and where that shows first."""

    kind: Kind
    first: Difference


def causes(under: Under, leave_out: frozenset[str], first: Difference) -> list[Unsteady]:
    """Return what a program depends on, by changing one condition at a time, with all others fixed."""
    fixed = under(0, _FIXED)
    if wrong := differences(under(0, _FIXED), fixed, leave_out):
        return [Unsteady(Kind.chance, wrong[0])]
    found = []
    if wrong := differences(under(1, _FIXED), fixed, leave_out):
        found.append(Unsteady(Kind.hashing, wrong[0]))
    for name, (kind, value) in _VARIED.items():
        if wrong := differences(under(0, {**_FIXED, name: value}), fixed, leave_out):
            found.append(Unsteady(kind, wrong[0]))
    return found or [Unsteady(Kind.chance, first)]
