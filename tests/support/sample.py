"""A part of a long table or campaign for `make test`; `make nightly` does all of it.

CNNJEPA_SAMPLE_SEED says which part; where one fails the name of the test tells the seed.
"""

import os
import random
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
# How many tests of each campaign `make test` runs, each of which takes a minute or so.
CAMPAIGNS = {
    "sweeps under Ray": 2,
    "faults on Slurm": 3,
    "drills": 1,
    "staged runs": 1,
    "sweeps of the docs": 1,
    "sweeps on Slurm": 3,
    "awkward sweeps": 3,
}
SEED = os.environ.get("CNNJEPA_SAMPLE_SEED", "1")
# For a test that draws by itself.
seeded = pytest.mark.parametrize("seed", [pytest.param(SEED, id=f"CNNJEPA_SAMPLE_SEED={SEED}")])


def drawn(values: Sequence[T], count: int, what: str, seed: str = SEED) -> list[T]:
    """Return `count` of the values, in their order."""
    kept = random.Random(f"{seed} {what}").sample(range(len(values)), count)
    return [values[i] for i in sorted(kept)]


def sampled(values: Sequence[Any], count: int, what: str) -> list[Any]:
    """Return all values as parameters of a test, those that are not drawn with the mark of `make nightly`."""
    kept = drawn(range(len(values)), count, what)
    parameters = []
    for number, value in enumerate(values):
        old = value if hasattr(value, "marks") else pytest.param(value)
        marks = [*old.marks] if number in kept else [*old.marks, pytest.mark.nightly]
        parameters.append(pytest.param(*old.values, marks=marks, id=old.id))
    return parameters


def leave_the_rest_to_nightly(items: Sequence[pytest.Item]) -> None:
    """Mark those tests of each campaign that are not drawn as nightly."""
    members: dict[str, list[pytest.Item]] = {}
    for item in items:
        if (mark := item.get_closest_marker("campaign")) and not item.get_closest_marker("nightly"):
            members.setdefault(mark.args[0], []).append(item)
    for name, found in members.items():
        found.sort(key=lambda item: item.nodeid)  # in whatever order they come: each worker of xdist draws the same
        kept = drawn(found, min(CAMPAIGNS[name], len(found)), name)
        for item in found:
            if item not in kept:
                item.add_marker(pytest.mark.nightly)
