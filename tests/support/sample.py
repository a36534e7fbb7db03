"""A part of a long table or campaign for `make test`; `make nightly` does all of it.

CNNJEPA_SAMPLE_SEED says which part; where one fails the name of the test tells the seed.
"""

import os
import random
from collections.abc import Sequence
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
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
