"""Share one error rate among the looks at a sweep that gets further seeds until its best is decided.

A sweep that is tested after each seed, and stops when p is below 5 %, is wrong in more than 5 % of
cases. Here the looks share 2.5 % as O'Brien and Fleming do: little for the first ones, when few runs are there,
and most for the last. Not 5 %: with the uneven spreads of real runs, claims would be false in twice
as many sweeps (tests/benchmarks/claims.py). The bounds are those of a normal mean looked at as it grows (Lan and
DeMets 1983), found by the recursion of Armitage, McPherson and Rowe (1969).
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from sweeps.report.winner import BEST, RULED_OUT

SHARED = 0.025  # two-sided, of all looks together
_GRID = np.linspace(-6.5, 6.5, 801)  # values of the sum, in standard deviations at the last look


@lru_cache
def levels(first: int, most: int) -> tuple[float, ...]:
    """Return the two-sided level of the look after each number of seeds from `first` to `most`."""
    from scipy.special import ndtr, ndtri  # scipy.stats would take 1 s and 60 MB

    step, z = _GRID[1] - _GRID[0], ndtri(1 - SHARED / 2)
    found, spent, before = [], 0.0, 0.0
    density = np.where(_GRID[len(_GRID) // 2] == _GRID, 1 / step, 0.0)  # at 0 before the first look
    for seeds in range(first, most + 1):
        share = seeds / most
        spread = math.sqrt(share - before)
        density = np.exp(-0.5 * ((_GRID[:, None] - _GRID) / spread) ** 2) @ density * step / (spread * math.sqrt(2 * math.pi))
        allowed = 2 * (1 - ndtr(z / math.sqrt(share))) - spent
        # The bound outside of which no more than `allowed` lies, of what no earlier look has decided.
        outside = 2 * (np.cumsum(density) - density / 2)[: len(_GRID) // 2] * step
        bound = float(np.interp(allowed, outside, -_GRID[: len(_GRID) // 2]))
        density = np.where(np.abs(_GRID) < bound, density, 0.0)
        found.append(float(2 * (1 - ndtr(bound / math.sqrt(share)))))
        spent, before = spent + allowed, share
    return tuple(found)


def level_at(seeds: int, until: Sequence[int]) -> float:
    """Return the level of the look after `seeds` seeds; `until` is [first, most], or [] for a single look."""
    if not until:
        return BEST
    first, most = until
    return levels(first, most)[min(max(seeds - first, 0), most - first)]


def screen(until: Sequence[int]) -> float:
    """Return the level at which a look rules a configuration out, which then gets no further seed."""
    first, most = until
    return RULED_OUT / (most - first + 1)


def found_in_most(spread: float, until: Sequence[int]) -> float:
    """Return the lead over one other configuration that is found in 80 % of sweeps by the last look.

    `spread` is the standard deviation over seeds.
    """
    from scipy.special import ndtri

    first, most = until
    return float((ndtri(1 - levels(first, most)[-1] / 2) + ndtri(0.8)) * spread * math.sqrt(2 / most))
