"""What a search may choose: dimensions over keys of the configuration, and the configurations in them; no torch, no Optuna."""

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cnnjepa.run.identity import lookup
from jobs.task import Task

_COUNTABLE = 10_000
Value = str | int | float
Params = dict[str, Value]


@dataclass(frozen=True)
class Dimension:
    """One key and what it may be: `options`, or the range [low, high] of which `grid` are the values that a grid takes.

    `when` names another key, earlier in the space, and the values of it with which this one matters; with others it is left alone.
    """

    key: str
    options: Sequence[Value] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    grid: Sequence[Value] = ()
    when: tuple[str, Sequence[Value]] | None = None

    def matters(self, chosen: Mapping[str, Value], base: Mapping[str, Any]) -> bool:
        """Whether the dimension has a say where the earlier ones are `chosen`."""
        if self.when is None:
            return True
        key, values = self.when
        return chosen.get(key, lookup(dict(base), key)) in values

    def check(self) -> None:
        """Raise ValueError unless there is something to choose."""
        if self.options:
            return
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"dimension {self.key} must have low < high, and low > 0 with log=True; got [{self.low}, {self.high}]")
        outside = [v for v in self.grid if not (isinstance(v, (int, float)) and self.low <= v <= self.high)]
        if outside:
            raise ValueError(f"grid of {self.key} must lie in [{self.low}, {self.high}]; got {outside[0]}")

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Dimension":
        """What a JSON file made of one."""
        when = None if values["when"] is None else (values["when"][0], tuple(values["when"][1]))
        return Dimension(**{**values, "options": tuple(values["options"]), "grid": tuple(values["grid"]), "when": when})


def choice(key: str, *options: Value, when: tuple[str, Sequence[Value]] | None = None) -> Dimension:
    """One of `options`."""
    return Dimension(key, options=options, when=when)


def real(key: str, low: float, high: float, *grid: float, log: bool = False, when: tuple[str, Sequence[Value]] | None = None) -> Dimension:
    """A number between `low` and `high`; a grid takes those of `grid`."""
    return Dimension(key, low=low, high=high, log=log, grid=grid, when=when)


def whole(key: str, low: int, high: int, *grid: int, when: tuple[str, Sequence[Value]] | None = None) -> Dimension:
    """A whole number from `low` to `high`; a grid takes those of `grid`, or all."""
    return Dimension(key, low=low, high=high, whole=True, grid=grid or tuple(range(low, high + 1)), when=when)


def grid_configurations(space: Sequence[Dimension], base: Mapping[str, Any]) -> list[Params]:
    """All combinations of options and grid values, each configuration once; raises ValueError at a range without a grid."""
    for dimension in space:
        if not (dimension.options or dimension.grid):
            raise ValueError(f"--sampler grid must have values for {dimension.key}; got a range without any: list them after its bounds")
    return combinations(space, [d.options or d.grid for d in space], base)


def all_configurations(space: Sequence[Dimension], base: Mapping[str, Any]) -> list[Params] | None:
    """Every configuration of the space, each once; None where they cannot be counted, or are more than anybody would train."""
    if any(not d.options and not d.whole for d in space):
        return None
    values = [d.options or range(int(d.low), int(d.high) + 1) for d in space]
    return combinations(space, values, base) if math.prod(map(len, values)) <= _COUNTABLE else None


def combinations(space: Sequence[Dimension], values: Sequence[Sequence[Value]], base: Mapping[str, Any]) -> list[Params]:
    """All combinations of `values`, less those of dimensions that do not matter in them, each once."""
    found: dict[tuple[tuple[str, Value], ...], Params] = {}
    for combination in itertools.product(*values):
        chosen: Params = {}
        for dimension, value in zip(space, combination, strict=True):
            if dimension.matters(chosen, base):
                chosen[dimension.key] = value
        found[tuple(chosen.items())] = chosen
    return list(found.values())


def baseline(space: Sequence[Dimension], base: Mapping[str, Any]) -> Params:
    """The choices that `base` itself makes; raises ValueError where the space does not hold it."""
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
    """The configuration `base` with `params` and `seed`, as plain values."""
    values = copy.deepcopy(dict(base))
    for key, value in params.items():
        *path, last = key.split(".")
        node = values
        for part in path:
            node = node[part]
        node[last] = value
    return {**values, "seed": seed}


def label(params: Mapping[str, Value], task: Task) -> str:
    """What people call a configuration, by its values alone: 'lr 0.0031, multi_block, depth 3'; 'unchanged' where nothing is set."""
    return ", ".join(_said(key, value, task) for key, value in params.items()) or "unchanged"


def _said(key: str, value: Value, task: Task) -> str:
    """A word is called by its task, a number needs its key's last part."""
    if isinstance(value, str):
        return task.word(key, value)
    return f"{key.rpartition('.')[2]} {value:.4g}" if isinstance(value, float) else f"{key.rpartition('.')[2]} {value}"
