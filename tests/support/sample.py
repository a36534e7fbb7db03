"""A part of the long tests, tables and campaigns for `make test`; `make nightly` does all of it.

CNNJEPA_SAMPLE_SEED says which part; where one fails the name of the test tells the seed.
"""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
SEED = os.environ.get("CNNJEPA_SAMPLE_SEED", "1")
_SEEDED = "CNNJEPA_SAMPLE_SEED"
# For a test that draws by itself.
seeded = pytest.mark.parametrize("seed", [pytest.param(SEED, id=f"{_SEEDED}={SEED}")])

LONG = Path(__file__).parent.parent / "long_tests.json"
# Test functions that take more than about half a second of a slow core, all parameters together: `make fast` leaves them out.
SLOW = Path(__file__).parent.parent / "slow_tests.json"
# What `make test` gives to the long tests, in seconds of one of its workers on two slow cores.
BUDGET = 1200


@dataclass(frozen=True)
class Long:
    """Tests that share what takes long, and the seconds that they take together."""

    seconds: float
    tests: tuple[str, ...]

    @property
    def file(self) -> str:
        return self.tests[0].partition("::")[0]

    @property
    def folder(self) -> str:
        return self.file.rpartition("/")[0]


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


def long_tests(path: Path = LONG) -> list[Long]:
    """Return the tests that are listed as long."""
    return [Long(entry["seconds"], tuple(entry["tests"])) for entry in json.loads(path.read_text())]


def kept(listed: Sequence[Long], budget: float, seed: str = SEED) -> list[Long]:
    """Return one of each folder, and as many more in a random order as the budget allows."""
    order = random.Random(f"{seed} long tests").sample(listed, len(listed))
    folders = dict[str, Long]()
    for found in order:
        folders.setdefault(found.folder, found)
    taken, left = list(folders.values()), budget - sum(found.seconds for found in folders.values())
    for found in order:
        if found not in taken and found.seconds <= left:
            taken.append(found)
            left -= found.seconds
    return taken


def _name(item: pytest.Item) -> str:
    """Return the node ID without the seed of the sample, which differs between runs."""
    return item.nodeid.replace(f"{_SEEDED}={SEED}", _SEEDED)


def _function(item: pytest.Item) -> str:
    """Return the node ID without parameters."""
    return item.nodeid.partition("[")[0]


def leave_the_rest_to_nightly(items: Sequence[pytest.Item], listed: Sequence[Long], whole_files: bool = False) -> None:
    """Mark long and slow tests as slow, and long ones that are not drawn as nightly.

    Raise UsageError if `whole_files` were collected and lack a test that is listed.
    """
    found = {_name(item) for item in items}
    functions, slow = {_function(item) for item in items}, set(json.loads(SLOW.read_text()))
    files = {name.partition("::")[0] for name in found}
    unknown = [test for entry in listed for test in entry.tests if entry.file in files and test not in found]
    unknown += sorted(name for name in slow if name.partition("::")[0] in files and name not in functions)
    if whole_files and unknown:
        raise pytest.UsageError(f"{LONG.name} or {SLOW.name} lists tests that do not exist: {', '.join(unknown)}")
    stay = {test for entry in kept(listed, BUDGET) for test in entry.tests}
    long = {test for entry in listed for test in entry.tests}
    for item in items:
        if _name(item) in long or _function(item) in slow:
            item.add_marker(pytest.mark.slow)
        if _name(item) in long - stay:
            item.add_marker(pytest.mark.nightly)


def long_ones_first(items: list[pytest.Item], listed: Sequence[Long]) -> None:
    """Put the long tests before the others, so that no worker begins one when the others have nothing left to do."""
    long = {test for entry in listed for test in entry.tests}
    items.sort(key=lambda item: _name(item) not in long)
