"""Search spaces: dimensions over configuration keys, and their combinations."""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from cnnjepa.run.identity import lookup, put

_COUNTABLE = 10_000
_GRID_MOST = 100_000  # combinations; catches a typo before the memory is full
_FINEST = 14  # a range is listed with 2^14 + 1 values at most
Value = str | int | float | bool
Params = dict[str, Value]
When = tuple[str, Sequence[Value] | Value]


def plain(value: Any) -> Any:
    """Return a NumPy scalar as a Python number, an enum by its name, and anything else as it is.

    A scalar of less than 64 bits becomes the number that it is printed as: 0.1, and not 0.10000000149.
    """
    if isinstance(value, Enum):
        return value.name
    if hasattr(value, "dtype") and hasattr(value, "item") and getattr(value, "shape", None) == ():
        number = value.item()
        return float(str(value)) if isinstance(number, float) else number
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Dimension:
    """One key and what it may be: `options`, or [low, high], of which a grid takes `grid`."""

    key: str
    options: Sequence[Value] = ()
    low: int | float = 0.0
    high: int | float = 0.0
    log: bool = False
    whole: bool = False
    grid: Sequence[Value] = ()
    when: When | None = None  # an earlier key, and its values for which this one matters
    step: int = 1  # of whole numbers

    def __post_init__(self) -> None:
        """Take plain values; one value of `when` becomes a tuple of one."""
        for name in ("options", "grid"):
            object.__setattr__(self, name, tuple(plain(list(getattr(self, name)))))
        for name in ("low", "high", "step"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        if isinstance(self.when, (tuple, list)) and len(self.when) == 2:
            key, values = self.when
            several = sorted(values, key=str) if isinstance(values, (set, frozenset)) else values
            several = several if isinstance(several, (tuple, list, range)) else (several,)
            object.__setattr__(self, "when", (key, tuple(plain(list(several)))))

    @property
    def whole_numbers(self) -> range:
        """Return the numbers of a dimension of whole numbers."""
        return range(int(self.low), int(self.high) + 1, self.step)

    @property
    def on_grid(self) -> Sequence[Value]:
        """Return the values that a grid takes; empty for a range without any."""
        return self.options or self.grid or (self.whole_numbers if self.whole else ())

    def matters(self, chosen: Mapping[str, Value], base: Mapping[str, Any]) -> bool:
        """Return whether the dimension applies, given the earlier choices."""
        if self.when is None:
            return True
        key, values = self.when
        assert isinstance(values, tuple)
        return (chosen[key] if key in chosen else lookup(dict(base), key)) in values

    @property
    def values(self) -> list[Value]:
        """Return values that it may have, those of its grid first."""
        if self.options:
            return list(self.options)
        low, high = (int(self.low), int(self.high)) if self.whole else (float(self.low), float(self.high))
        return [*([] if self.whole else self.grid), low, high]

    def holds(self, value: Any) -> bool:
        """Return whether `value` is one of the dimension's."""
        if self.options:
            return value in self.options
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return value in self.whole_numbers if self.whole else self.low <= value <= self.high

    @property
    def said(self) -> str:
        """Return what its values must do, for messages."""
        if self.options:
            return f"be one of {list(self.options)}"
        steps = f" in steps of {self.step}" if self.step != 1 else ""
        return f"lie in [{self.low}, {self.high}]{steps}"

    def spread(self, count: int) -> Sequence[Value]:
        """Return at most `count` of its values, from end to end; all, if there are no more."""
        if self.options or (self.whole and len(self.whole_numbers) <= count):
            return self.options or self.whole_numbers
        if self.whole:
            last = len(self.whole_numbers) - 1
            return [self.whole_numbers[i * last // (count - 1)] for i in range(count)]
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        between = [low + (high - low) * i / (count - 1) for i in range(1, count - 1)]
        return [self.low, *(min(max(math.exp(v) if self.log else v, self.low), self.high) for v in between), self.high]

    def identity(self) -> dict[str, Any]:
        """Return what tells it from another, as version 0.1 did: a short range of whole numbers was listed."""
        values = asdict(self)
        if values.pop("step") != 1:
            values["step"] = self.step
        elif self.whole and not self.grid and len(self.whole_numbers) <= _COUNTABLE:
            values["grid"] = tuple(self.whole_numbers)
        return values


def choice(key: str, *options: Value, when: When | None = None) -> Dimension:
    """Return a dimension with the given options."""
    return Dimension(key, options=options, when=when)


def real(key: str, low: float, high: float, *grid: float, log: bool = False, when: When | None = None) -> Dimension:
    """Return a dimension of numbers in [low, high]; a grid takes those in `grid`."""
    return Dimension(key, low=low, high=high, log=log, grid=grid, when=when)


def whole(key: str, low: int, high: int, *grid: int, log: bool = False, step: int = 1, when: When | None = None) -> Dimension:
    """Return a dimension of the integers low, low + step, ... up to `high`; a grid takes those in `grid`, or all."""
    return Dimension(key, low=low, high=high, log=log, whole=True, grid=grid, when=when, step=step)


def grid_configurations(space: Sequence[Dimension], base: Mapping[str, Any]) -> list[Params]:
    """Return all combinations on the grid; raise ValueError at a range without one, or at too many."""
    for dimension in space:
        if not dimension.on_grid:
            raise ValueError(f"--sampler grid must have values for {dimension.key}; got a range without any: list them after its bounds")
    found = list(itertools.islice(combinations(space, [d.on_grid for d in space], base), _GRID_MOST + 1))
    if len(found) > _GRID_MOST:
        widest = max(space, key=lambda d: len(d.on_grid))
        rule = f"--sampler grid must have at most {_GRID_MOST:,} combinations"
        raise ValueError(f"{rule}; got {len(widest.on_grid):,} values for {widest.key} alone: list a few after its bounds")
    return found


def all_configurations(space: Sequence[Dimension], base: Mapping[str, Any]) -> list[Params] | None:
    """Return all configurations, or None if the space is continuous or too large to list."""
    if any(not d.options and not d.whole for d in space):
        return None
    values = [d.options or d.whole_numbers for d in space]
    found = list(itertools.islice(combinations(space, values, base), _COUNTABLE + 1))
    return found if len(found) <= _COUNTABLE else None


def combinations(space: Sequence[Dimension], values: Sequence[Sequence[Value]], base: Mapping[str, Any]) -> Iterator[Params]:
    """Yield the combinations of `values`, without dimensions that do not matter, the last dimension changing fastest."""

    def rest(number: int, chosen: Params) -> Iterator[Params]:
        if number == len(space):
            yield chosen
        elif not space[number].matters(chosen, base):
            yield from rest(number + 1, chosen)
        else:
            for value in values[number]:
                yield from rest(number + 1, {**chosen, space[number].key: value})

    return rest(0, {})


def spread_out(space: Sequence[Dimension], base: Mapping[str, Any]) -> Iterator[Params]:
    """Yield configurations from all over the space, ever denser; some come more than once.

    All of a space that can be listed are among them.
    """
    for level in range(1, _FINEST + 1):
        values = [d.spread(2**level + 1) for d in space]
        yield from combinations(space, values, base)
        if all(d.options or (d.whole and len(v) == len(d.whole_numbers)) for d, v in zip(space, values, strict=True)):
            return


def baseline(space: Sequence[Dimension], base: Mapping[str, Any]) -> Params:
    """Return the choices that `base` itself makes; raise ValueError if outside the space."""
    chosen: Params = {}
    for d in space:
        value = lookup(dict(base), d.key)
        if not d.matters(chosen, base):
            continue
        if not d.holds(value):
            raise ValueError(f"the unchanged configuration must be in the space: {d.key} must {d.said}; got {value!r}")
        chosen[d.key] = value
    return chosen


def applied(base: Mapping[str, Any], params: Mapping[str, Value], seed: int) -> dict[str, Any]:
    """Return a copy of the plain values `base` with `params` and `seed`."""
    values = copy.deepcopy(dict(base))
    for key, value in params.items():
        put(values, key, value)
    return {**values, "seed": seed}
