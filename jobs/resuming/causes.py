"""Name what a resumed run has forgotten: put back one kind of state after another, and see which makes the run equal.

State that differs may be harmless: variables left over from before the save, or random numbers that
the program does not draw. So an item is named only if the run equals the undisturbed one with it put
back, and does not without it.
"""

import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.resuming.kinds import Kind
from jobs.resuming.live import Item, is_numbers

Items = dict[str, Item]
# From the likeliest cause to the least likely: the last are left out first.
_ORDER = (
    *(Kind.weights, Kind.average, Kind.optimizer, Kind.statistics, Kind.scaler, Kind.scheduler, Kind.order, Kind.sampler),
    *(Kind.rate, Kind.torch, Kind.numpy, Kind.python, Kind.buffer, Kind.array, Kind.value),
)
_LIKELY = _ORDER[: _ORDER.index(Kind.array)]
_RANDOM = (Kind.torch, Kind.numpy, Kind.python, Kind.order)
_RATES = (Kind.rate, Kind.scheduler)
# Words of a variable that holds a rate.
_RATE = re.compile(r"(?<![a-z])(lr|rate|eta|warmup|warm|anneal|annealing|sched|schedule|learning)(?![a-z])", re.IGNORECASE)


@dataclass
class Group:
    """Items of one kind below one variable, which are put back together."""

    kind: Kind
    root: str
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cause:
    """What was forgotten."""

    kind: Kind
    name: str  # of the variable, as the program reaches it
    size: str  # how far it is from what it was
    proved: bool  # whether the run equals the undisturbed one with it put back


def differing(before: Items, after: Items) -> list[Item]:
    """Return the items of the resumed run that are not what they were at the save."""
    return [item for name, item in after.items() if name in before and before[name].digest != item.digest]


def grouped(items: Iterable[Item]) -> list[Group]:
    """Return groups of items, the likeliest cause first."""
    found: dict[tuple[Kind, str], Group] = {}
    for item in items:
        root = item.root or item.name
        found.setdefault((item.kind, root), Group(item.kind, root)).names.append(item.name)
    return sorted(found.values(), key=lambda group: _ORDER.index(group.kind))


def smallest(groups: list[Group], equal: Callable[[list[Group]], bool]) -> list[Group] | None:
    """Return the fewest groups with which the run is equal, or None if it is not even with all."""
    likely = [g for g in groups if g.kind in _LIKELY]
    if likely and len(likely) < len(groups) and equal(likely):
        kept = likely
    elif groups and equal(groups):
        kept = groups
    else:
        return None
    size = max(len(kept) // 2, 1)
    while True:  # leave out many at once, and then fewer
        start = len(kept)
        while start > 0:
            without = kept[: max(start - size, 0)] + kept[start:]
            if without and equal(without):
                kept = without
            start -= size
        if size == 1:
            return kept
        size //= 2


def _numbers(value: Any) -> Any:
    """Return an array of float64 of any array, tensor or list of numbers; None for anything else."""
    import numpy as np

    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    if not (hasattr(value, "dtype") or is_numbers(value)):
        return None
    try:
        found = np.asarray(value)
        return found.astype(np.float64) if found.dtype.kind in "fiub" else None
    except (TypeError, ValueError):
        return None


def _is_permutation(a: Any, b: Any) -> bool:
    import numpy as np

    x, y = _numbers(a), _numbers(b)
    return x is not None and y is not None and x.shape == y.shape and x.size > 1 and bool((np.sort(x, None) == np.sort(y, None)).all())


def _of_array(names: list[str], before: Items, after: Items) -> Kind:
    """Return what an array is: the order of rows, an average of other arrays, or an optimizer's moments."""
    import numpy as np

    if any(_is_permutation(before[n].value, after[n].value) for n in names):
        return Kind.order
    shapes: dict[Any, list[Any]] = {}
    for name, item in before.items():
        if name not in names and item.kind in (Kind.array, Kind.weights, Kind.average) and (value := _numbers(item.value)) is not None:
            shapes.setdefault(value.shape, []).append(value)
    alike = [(v, shapes.get(v.shape, [])) for n in names if (v := _numbers(before[n].value)) is not None and v.size > 1]
    if not any(others for _, others in alike):
        return Kind.array
    close = 0
    for value, others in alike:
        for other in others:
            norms = float(np.linalg.norm(value) * np.linalg.norm(other))
            # An average points where the weights do and is about as long; moments are not both.
            ratio = float(np.linalg.norm(value)) / max(float(np.linalg.norm(other)), 1e-300)
            close += norms > 0 and float((value * other).sum()) / norms > 0.7 and 0.2 < ratio < 1.5
    return Kind.average if close else Kind.optimizer


def effects(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[Item]:
    """Return the items that differ in the lines that follow, and did not where they begin, the first to differ first.

    What is computed on the way to the loss is left out.
    """
    found: list[Item] = []
    known = {item.name for item in differing(before[0]["items"], after[0]["items"])} if before and after else set()
    for theirs, ours in zip(before[1:], after[1:]):
        new = [item for item in differing(theirs["items"], ours["items"]) if item.name not in known and not item.computed]
        if theirs["where"] != ours["where"]:  # they no longer run the same lines
            break
        found += sorted(new, key=lambda item: _ORDER.index(item.kind) if item.kind not in _RATES else -1)
        known |= {item.name for item in new}
    return found


def of_effects(items: Sequence[Item], is_earlier: Callable[[Item], bool], is_saved: Callable[[Item], bool]) -> Kind:
    """Return what is wrong where no state is, or only a number, by what differs next: a rate, an average or the data.

    `is_earlier` says whether the undisturbed run had the same data at its start, and `is_saved` whether
    an item is part of what is saved, and so no data.
    """
    for item in items:
        if item.kind in _RATES or (item.kind is Kind.value and _RATE.search(item.name)):
            return Kind.scheduler
        if item.kind in (Kind.array, Kind.sampler, Kind.order) and not is_saved(item):
            return Kind.sampler if is_earlier(item) else Kind.order
        if item.kind is not Kind.value:
            return item.kind if item is items[0] or item.kind is Kind.average else Kind.value
    return Kind.value


def named(kind: Kind, names: list[str], before: Items, after: Items) -> Kind:
    """Return the kind of what a group holds, from what it is."""
    if kind is Kind.array:
        return _of_array(names, before, after)
    return Kind.scheduler if kind is Kind.rate else kind


def size(names: list[str], before: Items, after: Items) -> str:
    """Return in words how far the items are from what they were."""
    import numpy as np

    if len(names) == 1 and before[names[0]].kind in (Kind.value, Kind.sampler):
        return f"{after[names[0]].value!r} instead of {before[names[0]].value!r}"
    if before[names[0]].kind in _RANDOM:
        return "another state"
    widest = 0.0
    for name in names:
        a, b = _numbers(after[name].value), _numbers(before[name].value)
        if a is not None and b is not None and a.shape == b.shape and a.size:
            widest = max(widest, float(np.abs(a - b).max()))
    parts = f"{len(names)} parts" if len(names) > 1 else ""
    numbers = f"up to {widest:.2g} away" if widest else ""
    return ", ".join(filter(None, [parts, numbers])) or _other(before[names[0]].value, after[names[0]].value)


def _other(before: Any, after: Any) -> str:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        if before and not after:
            return "empty"
        for key in before:
            if isinstance(before[key], (int, float)) and key in after and after[key] != before[key]:
                return f"{key} is {after[key]!r} instead of {before[key]!r}"
    return "another state"


def folded(causes: list[Cause]) -> list[Cause]:
    """Leave out what belongs to another cause: the buffers of an average, the rate of an optimizer."""
    roots: set[tuple[Kind, str]] = {(c.kind, c.name.rpartition(".")[0]) for c in causes if c.kind is Kind.optimizer}
    roots |= {(c.kind, c.name.partition(".")[0]) for c in causes}
    kept = []
    for cause in causes:
        root = cause.name.partition(".")[0]
        if cause.kind in (Kind.statistics, Kind.buffer) and ((Kind.average, root) in roots or (Kind.weights, root) in roots):
            continue
        if cause.name.endswith(".param_groups") and (Kind.optimizer, cause.name.removesuffix(".param_groups")) in roots:
            continue
        kept.append(cause)
    return kept


def common(names: list[str]) -> str:
    """Return what the names of items have in common, up to a point of the path."""
    first, last = min(names), max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    if length == len(first) == len(last):
        return first
    shared = first[:length]
    cut = max(shared.rfind("."), shared.rfind("["))
    return shared[:cut] if cut > 0 else shared


def write(items: Items, path: Path) -> None:
    """Keep items in a file, for a run that puts them back."""
    path.write_bytes(pickle.dumps({name: Item(i.name, i.kind, i.value, None, i.root, i.digest) for name, i in items.items()}))
