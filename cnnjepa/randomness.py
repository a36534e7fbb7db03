"""Generate random numbers from integers, alike in any process, on any rank, after any resume."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Uses of random numbers, so that two uses of one seed never share numbers."""

    order = 1
    mask = 2
    view = 3
    weights = 4
    step = 5
    split = 6
    probe = 7
    # 8 is the sampler's: sweeps/search/sampler.py
    direction = 9


def generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """Return a new generator that depends only on (seed, stream, key); takes 20 microseconds."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, *key))))


def integer(seed: int, stream: Stream, *key: int) -> int:
    """Return an integer in [0, 2**63) of (seed, stream, key), to seed a library's generator."""
    return int(generator(seed, stream, *key).integers(2**63))
