"""Choose the folder of a sweep: sweeps of another base configuration lie side by side.

A command whose overrides change no result has the folder NAME-SCALE. Overrides that do are part of the
folder's name, as in NAME-SCALE-epochs20, by what they change and not by how they were typed. Earlier
versions put everything into NAME-SCALE: what began there goes on there.
"""

import argparse
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from cnnjepa.run.files import read_json, reading
from cnnjepa.run.identity import lookup, to_dict
from cnnjepa.run.typed import checked
from jobs.config import compose_job, qualified
from jobs.planned import apart_from_data
from jobs.task import Task, task_named
from sweeps.spec.sweep import Scale, ScaleName, SweepSpec
from sweeps.state.history import last_command

_MOST = 48  # characters of what a name tells; a digest stands for the rest
_DIGITS = 8  # of that digest
_NAME = re.compile(r"\w[\w.-]{0,99}")
_TAKEN = ("single", "hydra")  # below runs_dir, by jobs.pretrain
_WORD = re.compile(r"[A-Za-z0-9_.+-]+")
_OVERRIDE = re.compile(r"[A-Za-z_][\w./@-]*=")
# Options of a sweep that take no value; the word after any other one is its value.
_FLAGS = ("--retry-failed", "--start-again", "--keep", "--rerun", "--dry-run", "--detach", "--yes", "--two-objectives")

Leaves = dict[str, Any]  # full key -> value


class Base:
    """What a command changes in the base configuration of a sweep, apart from the data, which are compared when they are read."""

    def __init__(self, spec: SweepSpec, scale: Scale, cluster: str, profile: Sequence[str]) -> None:
        """Take the sweep, and the words of the command that belong to its cluster profile."""
        self._spec, self._scale, self._first = spec, scale, [f"cluster={cluster}", *profile]
        self._task = task_named(spec.task_name)
        self._known: dict[tuple[str, ...], _Leaves] = {}
        configurations = spec.configurations_at(scale)
        groups = self._task.groups()
        chosen = [tuple(f"{k}={v}" for k, v in c.overrides.items() if k in groups) for c in configurations]
        self._choices = list(dict.fromkeys([(), *chosen]))  # presets that configurations begin with
        every = [set(c.overrides) for c in configurations]
        self._swept = set.intersection(*every) if every else set()

    def changed(self, overrides: Sequence[str]) -> Leaves:
        """Return full key -> value of what `overrides` change in any result, {} if nothing.

        Raise ValueError if they do not fit the sweep.
        """
        if all(override.startswith("cluster.") for override in qualified(overrides, self._spec.task_name)):
            return {}
        needed = self._needed(overrides)
        found: Leaves = {}
        for choice in self._choices:
            try:
                with_them, without = self._leaves([*choice, *overrides]), self._leaves([*choice, *needed])
            except ValueError:
                if not choice:
                    raise
                continue  # it is refused when the trials are built
            found |= {key: value for key, value in _differing(with_them, without).items() if key not in self._swept}
        return found

    def _needed(self, overrides: Sequence[str]) -> list[str]:
        """Return those overrides without which the sweep has no configuration at all, often none."""
        needed = [] if self._fits([]) else list(overrides)
        for override in list(needed):
            rest = [o for o in needed if o != override]
            if self._fits(rest):
                needed = rest
        return needed

    def _fits(self, overrides: Sequence[str]) -> bool:
        try:
            self._leaves(overrides)
        except ValueError:
            return False
        return True

    def _leaves(self, overrides: Sequence[str]) -> "_Leaves":
        """Return what identifies the base configuration under `overrides`; nothing checks whether it could be trained."""
        words = (*self._first, *self._scale.overrides, *overrides)
        if words not in self._known:
            self._known[words] = _Leaves(compose_job(words, self._spec.task_name, validated=False).train)
        return self._known[words]

    def suffix(self, overrides: Sequence[str]) -> str:
        """Return what the folder's name says of `overrides`, as in -epochs20-lr0.01, or "" if they change no result."""
        changed = self.changed(overrides)
        if not changed:
            return ""
        wanted, needed = self._leaves(overrides), self._needed(overrides)
        presets = self._presets(wanted, needed)
        by_presets = _differing(wanted, self._leaves(needed)).keys() - _differing(wanted, self._leaves([*needed, *presets])).keys()
        left = {key: value for key, value in sorted(changed.items()) if key not in by_presets}
        names = short_names(left, dict(leaves(wanted.values_of_all)))
        told = [_told(*preset.split("=")) for preset in presets] + [_told(names[key], value) for key, value in left.items()]
        shown = list(filter(None, told))
        while sum(map(len, shown)) + len(shown) > _MOST:
            shown.pop()
        if len(shown) < len(told):
            shown.append(hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:_DIGITS])
        return "".join(f"-{word}" for word in shown)

    def _presets(self, wanted: "_Leaves", needed: Sequence[str]) -> list[str]:
        """Return the presets, such as method=simclr, that tell most of how `wanted` differs."""
        found: list[str] = []
        for group, presets in self._task.groups().items():
            left = _differing(wanted, self._leaves([*needed, *found]))
            if not _may_be_preset(group, left, wanted):
                continue
            counts = {}
            own = wanted.get(f"{group}.name")
            for preset in sorted(f"{group}={name}" for name, of_preset in presets.items() if own in (None, _name_of(of_preset), name)):
                with suppress(ValueError):
                    counts[preset] = len(_differing(wanted, self._leaves([*needed, *found, preset])))
            best = min(counts, key=lambda preset: counts[preset], default="")
            if best and counts[best] < len(left):
                found.append(best)
        return found


class _Leaves(dict[str, Any]):
    """What identifies a configuration, by full key; beside it, all its values: a key at its default may be no part of the former."""

    def __init__(self, train: Any) -> None:
        super().__init__((key, value) for key, value in leaves(apart_from_data(train)) if key != "seed")
        self.values_of_all = to_dict(train)

    def value(self, key: str) -> Any:
        """Return the value of a key; raise ValueError if the configuration lacks it."""
        return self[key] if key in self else lookup(self.values_of_all, key)


def _differing(now: _Leaves, before: _Leaves) -> Leaves:
    """Return the values `now` of keys that differ; a key that only the earlier configuration has is told by the others."""
    found = {}
    for key in now.keys() | before.keys():
        if now.get(key, ...) != before.get(key, ...):
            with suppress(ValueError):
                found[key] = now.value(key)
    return found


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield full key and value of each hyperparameter of nested plain values."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{path}{key}.")
        elif value != {}:
            yield f"{path}{key}", value


def _may_be_preset(group: str, left: Leaves, wanted: _Leaves) -> bool:
    """Return whether another preset of `group` may explain what is left: its name differs, or without one several of its values."""
    if isinstance(of_group := wanted.values_of_all.get(group), dict) and "name" in of_group:
        return f"{group}.name" in left
    return sum(key.startswith(f"{group}.") for key in left) > 1


def _name_of(preset: Any) -> Any:
    """Return the value that a preset has for `name`, or None."""
    name = getattr(preset, "name", None)
    return name.name if isinstance(name, Enum) else name


def short_names(keys: Collection[str], among: Collection[str]) -> dict[str, str]:
    """Return the shortest end of each key that no other one of `among` has: lr for optimizer.lr."""
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[at:]) for at in range(len(parts) - 1, -1, -1)]
        others = [other for other in among if other != key]
        found[key] = next((end for end in ends if not any(o == end or o.endswith(f".{end}") for o in others)), key)
    return found


def _told(name: str, value: Any) -> str:
    """Return 'epochs20' or 'conv_dense'; "" for a value that is no plain word."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e6
        word = f"{name}{'_' * name[-1:].isdecimal()}{int(value) if whole else value!r}"
    elif isinstance(value, str):
        word = f"{name}_{value}" if value else ""
    elif isinstance(value, list):
        word = f"{name}_{'+'.join(map(str, value))}" if value and all(isinstance(v, (str, int, float)) for v in value) else ""
    else:
        word = f"{name}_{json.dumps(value)}"
    return word if _WORD.fullmatch(word) else ""


def folder_of(
    spec: SweepSpec, scale: ScaleName, base: Base, asked: argparse.Namespace, runs_dir: Path, ids: Callable[[], set[str]]
) -> Path:
    """Return the sweep's folder. `ids` gives run IDs of its trials, where these must be looked for.

    Raise ValueError if --name is none of a folder, or names that of another sweep.
    """
    usual = f"{spec.name}-{scale.name}"
    grid = bool(spec.space and asked.sampler == "grid")
    if asked.name is not None:
        return _named(runs_dir, asked.name, spec, scale)
    changed = base.changed(asked.overrides)
    first = runs_dir / f"{usual}{'-grid' * grid}"
    if not changed:
        return first
    named = runs_dir / f"{first.name}{base.suffix(asked.overrides)}"
    if is_sweep(named):
        return named
    beside = [path.parent for path in sorted(runs_dir.glob(f"{_escaped(first.name)}-*/sweep.json"))]
    for folder in [first, *beside]:
        if is_sweep(folder) and _may_be_of(folder, spec, scale) and _last_changed(base, folder, spec, grid) == changed:
            return folder
    # It may have begun in the usual folder and been taken out of its tables since.
    begun = {path.name for path in (first / "trials").glob("[!.]*")} if is_sweep(first) else set()
    return first if begun and begun & ids() else named


def is_sweep(folder: Path) -> bool:
    """Return whether a folder holds a sweep."""
    return (folder / "sweep.json").exists()


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _named(runs_dir: Path, name: str, spec: SweepSpec, scale: ScaleName) -> Path:
    if not _NAME.fullmatch(name):
        raise ValueError(f"--name must be the name of a folder, of letters, digits, _, . and -, at most 100; got {name[:120]!r}")
    if name in _TAKEN:
        raise ValueError(f"--name must not be {' or '.join(_TAKEN)}, which hold single runs; got {name}: choose another name")
    folder = runs_dir / name
    if is_sweep(folder):
        held = _held(folder)
        if held != (spec.name, scale.name):
            got = f"that of {held[0]} at {held[1]} scale"
            raise ValueError(
                f"--name must be a new folder, or one of {spec.name} at {scale.name} scale; got {name}, {got}: choose another name"
            )
    return folder


def _held(folder: Path) -> tuple[str, str]:
    """Return name and scale of the sweep in a folder."""
    with reading(folder / "sweep.json"):
        values = read_json(folder / "sweep.json")
        return checked(str, values["name"], "name"), checked(str, values["scale"], "scale")


def _may_be_of(folder: Path, spec: SweepSpec, scale: ScaleName) -> bool:
    """Return whether a folder may hold this sweep: one whose file is damaged is then refused by name, and not begun elsewhere."""
    try:
        return _held(folder) == (spec.name, scale.name)
    except ValueError:
        return True


def _last_changed(base: Base, folder: Path, spec: SweepSpec, grid: bool) -> Leaves | None:
    """Return what the last command in a folder changed, None if that is unknown, of another kind, or its folder was named by hand."""
    words = last_command(folder)
    if not words or any(word == "--name" or word.startswith("--name=") for word in words):
        return None
    if grid != ("--sampler=grid" in words or ("--sampler", "grid") in itertools.pairwise(words)):
        return None
    try:
        return base.changed(_today(overrides_in(words), task_named(spec.task_name)))
    except ValueError:
        return None


def _today(overrides: Sequence[str], task: Task) -> list[str]:
    """Return overrides under the names that their keys have now."""
    parts = [override.partition("=") for override in overrides]
    return [f"{task.RENAMED.get(key, key)}={value}" for key, _, value in parts]


def overrides_in(words: Sequence[str]) -> list[str]:
    """Return the key=value words of a recorded command, which are no values of options."""
    found, value = [], False
    for word in words:
        if not value and _OVERRIDE.match(word):
            found.append(word)
        value = word.startswith("--") and "=" not in word and word not in _FLAGS and not value
    return found
