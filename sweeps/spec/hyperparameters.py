"""Tell which hyperparameters the trials of a sweep differ in, by full key: optimizer.lr."""

import json
from collections.abc import Sequence
from typing import Any

from cnnjepa.run.identity import leaves
from sweeps.spec.sweep import Search, Trial

_NOT = ("seed", "task")  # a seed has a column of its own; the task is the sweep's


def varying(trials: Sequence[Trial], search: Search | None = None) -> list[str]:
    """Return the keys in which trials differ, or may differ in a search, those that the sweep sets first.

    A key that only some have counts.
    """
    first: dict[str, Any] = {}
    seen: dict[str, int] = {}
    differing = set()
    for trial in trials:
        for key, value in leaves(trial.values):
            seen[key] = seen.get(key, 0) + 1
            if first.setdefault(key, value) != value:
                differing.add(key)
    searched = [d.key for d in search.space] if search is not None else []
    found = {key for key in first if key in searched or ((key in differing or seen[key] < len(trials)) and key not in _NOT)}
    ordered = [key for key in [*searched, *_given(trials)] if key in found]
    return list(dict.fromkeys([*ordered, *(key for key in first if key in found)]))


def columns(trials: Sequence[Trial], search: Search | None = None) -> list[str]:
    """Return the keys to list of each trial: what varies, and then what the sweep or its command sets for all."""
    known = {key for trial in trials for key, _ in leaves(trial.values)} - {*_NOT}
    return list(dict.fromkeys([*varying(trials, search), *(key for key in _given(trials) if key in known)]))


def shown(trials: Sequence[Trial], search: Search | None = None) -> list[str]:
    """Return the keys of `varying` that the sweep itself sets, or all if it sets none of them: what a page has room for."""
    found, given = varying(trials, search), set(_given(trials))
    return [key for key in found if key in given] or found


def chosen(trial: Trial, keys: Sequence[str]) -> dict[str, Any]:
    """Return key -> value of a trial, of those of `keys` that it has."""
    own = dict(leaves(trial.values))
    return {key: own[key] for key in keys if key in own}


def cell(value: Any) -> Any:
    """Return a value for a cell of a table: numbers and texts as they are, anything else as JSON."""
    return value if isinstance(value, (str, int, float)) or value is None else json.dumps(value)


def cells(trial: Trial, keys: Sequence[str]) -> list[str]:
    """Return the values of `keys` for a table for people, "-" for one that the trial lacks."""
    own = chosen(trial, keys)
    return [str(cell(own[key])) if key in own else "-" for key in keys]


def _given(trials: Sequence[Trial]) -> list[str]:
    """Return the keys that trials set, those of their configurations before those of all."""
    counts: dict[str, set[str]] = {}
    for trial in trials:
        for key, _, value in (word.partition("=") for word in trial.overrides):
            counts.setdefault(key, set()).add(value)
    return sorted(counts, key=lambda key: len(counts[key]) == 1)
