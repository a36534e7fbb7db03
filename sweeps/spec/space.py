"""Search spaces: dimensions over configuration keys, and their combinations."""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cnnjepa.run.identity import lookup, put
from jobs.task import Task

_COUNTABLE = 10_000
Value = str | int | float | bool
Params = dict[str, Value]


@dataclass(frozen=True)
class Dimension:
    """One key and what it may be: `options`, or [low, high], of which a grid takes `grid`."""

    key: str
    options: Sequence[Value] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    grid: Sequence[Value] = ()
    when: tuple[str, Sequence[Value]] | None = None  # an earlier key, and its values for which this one matters

    def matters(self, chosen: Mapping[str, Value], base: Mapping[str, Any]) -> bool:
        """Return whether the dimension applies, given the earlier choices."""
        if self.when is None:
            return True
        key, values = self.when
        return chosen.get(key, lookup(dict(base), key)) in values

    @property
    def values(self) -> list[Value]:
        """Return values that it may have, those of its grid first."""
        if self.options:
            return list(self.options)
        low, high = (int(self.low), int(self.high)) if self.whole else (float(self.low), float(self.high))
        return [*([] if self.whole else self.grid), low, high]

    def check(self) -> None:
        """Raise ValueError if the range is empty or the grid leaves it."""
        if self.options:
            return
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"dimension {self.key} must have low < high, and low > 0 with log=True; got [{self.low}, {self.high}]")
        outside = [v for v in self.grid if not (isinstance(v, (int, float)) and self.low <= v <= self.high)]
        if outside:
            raise ValueError(f"grid of {self.key} must lie in [{self.low}, {self.high}]; got {outside[0]}")


def choice(key: str, *options: Value, when: tuple[str, Sequence[Value]] | None = None) -> Dimension:
    """Return a dimension with the given options."""
    return Dimension(key, options=options, when=when)


def real(key: str, low: float, high: float, *grid: float, log: bool = False, when: tuple[str, Sequence[Value]] | None = None) -> Dimension:
    """Return a dimension of numbers in [low, high]; a grid takes those in `grid`."""
    return Dimension(key, low=low, high=high, log=log, grid=grid, when=when)


def whole(key: str, low: int, high: int, *grid: int, when: tuple[str, Sequence[Value]] | None = None) -> Dimension:
    """Return a dimension of integers in [low, high]; a grid takes those in `grid`, or all."""
    return Dimension(key, low=low, high=high, whole=True, grid=grid or tuple(range(low, high + 1)), when=when)


def grid_configurations(space: Sequence[Dimension], base: Mapping[str, Any]) -> list[Params]:
    """Return all combinations on the grid; raise ValueError at a range without one."""
    for dimension in space:
        if not (dimension.options or dimension.grid):
            raise ValueError(f"--sampler grid must have values for {dimension.key}; got a range without any: list them after its bounds")
    return combinations(space, [d.options or d.grid for d in space], base)


def all_configurations(space: Sequence[Dimension], base: Mapping[str, Any]) -> list[Params] | None:
    """Return all configurations, or None if the space is continuous or too large to list."""
    if any(not d.options and not d.whole for d in space):
        return None
    values = [d.options or range(int(d.low), int(d.high) + 1) for d in space]
    return combinations(space, values, base) if math.prod(map(len, values)) <= _COUNTABLE else None


def combinations(space: Sequence[Dimension], values: Sequence[Sequence[Value]], base: Mapping[str, Any]) -> list[Params]:
    """Return the distinct combinations of `values`, without dimensions that do not matter."""
    found: dict[tuple[tuple[str, Value], ...], Params] = {}
    for combination in itertools.product(*values):
        chosen: Params = {}
        for dimension, value in zip(space, combination, strict=True):
            if dimension.matters(chosen, base):
                chosen[dimension.key] = value
        found[tuple(chosen.items())] = chosen
    return list(found.values())


def baseline(space: Sequence[Dimension], base: Mapping[str, Any]) -> Params:
    """Return the choices that `base` itself makes; raise ValueError if outside the space."""
    chosen: Params = {}
    for d in space:
        value = lookup(dict(base), d.key)
        assert isinstance(value, (str, int, float))
        if not d.matters(chosen, base):
            continue
        if d.options and value not in d.options:
            raise ValueError(f"the unchanged configuration must be in the space: {d.key} must be one of {list(d.options)}; got {value}")
        if not d.options and not (not isinstance(value, str) and d.low <= value <= d.high):
            raise ValueError(f"the unchanged configuration must be in the space: {d.key} must lie in [{d.low}, {d.high}]; got {value}")
        chosen[d.key] = value
    return chosen


def applied(base: Mapping[str, Any], params: Mapping[str, Value], seed: int) -> dict[str, Any]:
    """Return a copy of the plain values `base` with `params` and `seed`."""
    values = copy.deepcopy(dict(base))
    for key, value in params.items():
        put(values, key, value)
    return {**values, "seed": seed}


def label(params: Mapping[str, Value], task: Task) -> str:
    """Return a display name such as 'lr 0.0031, multi_block, depth 3', or 'unchanged'."""
    return ", ".join(_said(key, value, task) for key, value in params.items()) or "unchanged"


def _said(key: str, value: Value, task: Task) -> str:
    """Return the task's name for a word, or a number after the last part of its key."""
    if isinstance(value, str):
        return task.word(key, value)
    return f"{key.rpartition('.')[2]} {value:.4g}" if isinstance(value, float) else f"{key.rpartition('.')[2]} {value}"
