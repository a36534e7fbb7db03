"""Compose many configurations of one sweep: with Hydra only where something is new."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cnnjepa.run.identity import from_dict, lookup, put, to_dict
from jobs.cluster import JobSpec
from jobs.task import Task, task_of

Overrides = Mapping[str, Any]


class Composer:
    """Composes what a sweep's configurations set.

    Hydra takes some 80 ms for a configuration, and a grid of a thousand has only a few values of
    each key. A configuration is composed in full if it sets other keys than one before, or a value
    whose form in the configuration is not known yet; else its values are put in their places. Both
    give the same configuration, and both are checked by the same rules.
    """

    def __init__(self, job: Callable[[Sequence[str]], JobSpec], task: Task) -> None:
        """Take the function that composes a job from the overrides of a configuration."""
        self._job, self._task = job, task
        # Presets, and what a profile's facts are set by, change other keys than their own.
        self._far = {*task.groups(), *task.KEYS.values()}
        self._known: dict[tuple[Any, ...], tuple[dict[str, Any], int]] = {}  # keys -> plain values of one, its ranks
        self._forms: dict[tuple[Any, ...], Any] = {}  # what a value becomes: a value, or int, float or bool

    def train(self, overrides: Overrides) -> Any:
        """Return the configuration to train; raise ValueError at the first broken rule."""
        shape = self._shape(overrides)
        if shape in self._known and all(self._form(shape, k, v) in self._forms for k, v in self._near(overrides).items()):
            values, ranks = self._known[shape]
            values = _copy(values)
            for key, value in self._near(overrides).items():
                form = self._forms[self._form(shape, key, value)]
                put(values, key, form(value) if isinstance(form, type) else form)
            config = from_dict(values)
            self._task.validate(config, ranks)
            return config
        job = self._job([f"{key}={value}" for key, value in overrides.items()])
        self._learn(shape, overrides, job)
        return job.train

    def _learn(self, shape: tuple[Any, ...], overrides: Overrides, job: JobSpec) -> None:
        if task_of(job.train).name != self._task.name:
            return
        values = to_dict(job.train)
        try:
            found = {key: lookup(values, key) for key in self._near(overrides)}
        except ValueError:  # a key that this does not know how to put in its place
            return
        self._known[shape] = values, job.cluster.ranks_per_trial
        for key, value in self._near(overrides).items():
            by_kind = _is_number(value) and _is_number(found[key]) and type(found[key])(value) == found[key] == value
            self._forms[self._form(shape, key, value)] = type(found[key]) if by_kind else found[key]

    def _near(self, overrides: Overrides) -> Overrides:
        """Return those of `overrides` that change no other key."""
        return {k: v for k, v in overrides.items() if k not in self._far}

    def _shape(self, overrides: Overrides) -> tuple[Any, ...]:
        """Return what configurations of the same keys have in common, beside the values of near keys."""
        return tuple((k, repr(v)) if k in self._far else (k, "") for k, v in overrides.items())

    def _form(self, shape: tuple[Any, ...], key: str, value: Any) -> tuple[Any, ...]:
        """Return what values of the same form have in common: numbers of one type, or the value itself."""
        return shape, key, type(value).__name__, "" if _is_number(value) else repr(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, bool) or (type(value) is float and math.isfinite(value))


def _copy(values: dict[str, Any]) -> dict[str, Any]:
    """Copy nested dictionaries, and no leaf: `copy.deepcopy` takes ten times as long."""
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in values.items()}
