"""Tell which hyperparameters the trials of a sweep differ in, by full key: optimizer.lr."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sweeps.spec.sweep import Trial

_NOT = ("seed", "task")  # a seed has a column of its own; the task is the sweep's


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield full key and value of each hyperparameter."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{key}.")
        elif path or key != "task":
            yield f"{path}{key}", value


def varying(trials: Sequence[Trial]) -> list[str]:
    """Return the keys in which trials differ, those that the sweep sets first. A key that only some have counts."""
    first: dict[str, Any] = {}
    seen: dict[str, int] = {}
    differing = set()
    for trial in trials:
        for key, value in leaves(trial.values):
            seen[key] = seen.get(key, 0) + 1
            if first.setdefault(key, value) != value:
                differing.add(key)
    found = {key for key in first if (key in differing or seen[key] < len(trials)) and key not in _NOT}
    ordered = [key for key in _given(trials) if key in found]
    return list(dict.fromkeys([*ordered, *(key for key in first if key in found)]))


def columns(trials: Sequence[Trial]) -> list[str]:
    """Return the keys to list of each trial: what varies, and then what the sweep or its command sets for all."""
    known = {key for trial in trials for key, _ in leaves(trial.values)} - {*_NOT}
    return list(dict.fromkeys([*varying(trials), *(key for key in _given(trials) if key in known)]))


def chosen(trial: Trial, keys: Sequence[str]) -> dict[str, Any]:
    """Return key -> value of a trial, of those of `keys` that it has."""
    own = dict(leaves(trial.values))
    return {key: own[key] for key in keys if key in own}


def _given(trials: Sequence[Trial]) -> list[str]:
    """Return the keys that trials set, those of their configurations before those of all."""
    counts: dict[str, set[str]] = {}
    for trial in trials:
        for key, _, value in (word.partition("=") for word in trial.overrides):
            counts.setdefault(key, set()).add(value)
    return sorted(counts, key=lambda key: len(counts[key]) == 1)
