"""A sweep: a question, the configurations or the space that answer it, and its trials."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from cnnjepa.run.identity import DEFAULT_TASK, fidelity, from_dict, hold, identity, length, load_from, signature, to_dict
from cnnjepa.run.typed import build, checked
from jobs.cluster import JobSpec
from jobs.command import CommandTask
from jobs.config import compose_job
from jobs.plain import PlainTask
from jobs.program import holder_of
from jobs.task import task_named, task_of
from jobs.trial_names import trial_name
from sweeps.spec.check import check_one_kind, checked_space, neutral_keys, refuse_chosen_weights
from sweeps.spec.compose import Composer
from sweeps.spec.labels import label, labels
from sweeps.spec.parts import check_parts
from sweeps.spec.space import Dimension, Params, Value, all_configurations, applied, baseline, grid_configurations, plain, spread_out

FIRST_SEED = 42  # the paper's one seed
SAMPLERS = ("multi_fidelity", "tpe", "random", "gp", "grid")  # the first is the default
MAX_FAILURES = 10
# Keys of version 0.1, which sweep.json and points/ keep -> their names here.
_KEYS = {"setting": "label", "point": "configuration_number", "points": "max_trials"}
# What a sweep has with a command alone, and what it is without.
_OF_COMMANDS: dict[str, Any] = {
    "command": (), "defaults": {}, "direction": "", "unit": "", "version": "", "files": (), "grace_seconds": None,
}  # fmt: skip
_RUN_ID = re.compile(r"\w[\w.-]*")
_OLD_KEYS = {new: old for old, new in _KEYS.items()}


class ScaleName(Enum):
    """Size of a sweep: smoke takes minutes on two cores; paper is the paper's experiment."""

    smoke = "smoke"
    paper = "paper"


@dataclass(frozen=True)
class Scale:
    """Overrides of all trials at one scale, and what else is special to it."""

    overrides: Sequence[str]
    seeds: int  # default per configuration; in a search, at most
    max_trials: int = 0  # configurations that a search tries
    space: Sequence[Dimension] = ()  # replace the sweep's dimensions of the same keys
    configurations: Sequence["Configuration"] = ()  # replace the sweep's, if there are any

    def __post_init__(self) -> None:
        """Take NumPy's numbers as Python's."""
        for name in ("seeds", "max_trials"):
            object.__setattr__(self, name, plain(getattr(self, name)))


@dataclass(frozen=True)
class Configuration:
    """One configuration of a sweep; what it sets also names it."""

    overrides: Mapping[str, Value]
    paper: Mapping[str, float] = field(default_factory=dict)  # the paper's figures by metric (percent) or cost (hours)
    best_of_many: bool = False  # each of the paper's scores is the best of several runs

    def __post_init__(self) -> None:
        """Take plain values: NumPy scalars and enums as Python's."""
        for name in ("overrides", "paper"):
            if isinstance(values := getattr(self, name), Mapping):  # else it is refused by name when the sweep is planned
                object.__setattr__(self, name, {key: plain(value) for key, value in values.items()})


@dataclass(frozen=True)
class SweepSpec:
    """A question, and the configurations or the space that answer it."""

    name: str = ""  # of the folder; "": that of the sweep's file
    question: str = ""
    smoke: Scale | None = None  # None: as paper
    paper: Scale | None = None  # None: as smoke
    configurations: Sequence[Configuration] = ()
    space: Sequence[Dimension] = ()
    objective: str = ""  # metric that ranks configurations, on held-out labels; "": the task's
    headline: Sequence[str] | None = None  # metrics of the table; None: the task's
    costs: Sequence[str] = ()  # costs in results.csv that get a column; the headline is plotted against the first
    prune_on: Sequence[str] = ()  # early warnings that end a run at a probe
    named_by: Sequence[str] = ()  # keys that name a configuration; all if empty
    task: str | PlainTask = DEFAULT_TASK  # what trains: a PlainTask, or the module of a task (jobs/task.py)
    # Of a command in place of a task (jobs/command.py), what PlainTask has for a function:
    command: Sequence[str] = ()  # words to start, with {key} for a value
    defaults: Mapping[str, Value] = field(default_factory=dict)  # key: value, of keys that not every configuration sets
    direction: str = ""
    unit: str = ""
    version: str = ""
    files: Sequence[str] = ()
    grace_seconds: float | None = None  # None: GRACE_SECONDS of jobs/command.py

    @cached_property
    def own_task(self) -> PlainTask | None:
        """Return the task that the sweep brings itself, or None if it names one; raise ValueError if it is none."""
        check_parts(self)
        if not self.command:
            if given := [name for name in _OF_COMMANDS if getattr(self, name) not in (None, "", (), [], {})]:
                remedy = "leave it out" if given[0] in ("defaults", "grace_seconds") else "give it to the PlainTask"
                raise ValueError(f"{given[0]} must come with a command; got {getattr(self, given[0])!r} without one: {remedy}")
            return None if isinstance(self.task, str) else self.task
        if self.task != DEFAULT_TASK:
            raise ValueError(f"a sweep must have a task or a command; got both, {self.task} and {self.command[0]}")
        scales = [scale for scale in (self.smoke, self.paper) if scale is not None]
        values: dict[str, list[Value]] = {key: [plain(value)] for key, value in self.defaults.items()}
        for configuration in [*self.configurations, *(c for scale in scales for c in scale.configurations)]:
            for key, value in configuration.overrides.items():
                values.setdefault(key, []).append(value)
        for dimension in [*self.space, *(d for scale in scales for d in scale.space)]:
            check_one_kind(dimension)
            values.setdefault(dimension.key, []).extend(dimension.values)
        about: dict[str, Any] = {"unit": self.unit, "version": self.version, "files": self.files, "headline": self.headline or ()}
        about |= {"direction": self.direction} if self.direction else {}
        about |= {} if self.grace_seconds is None else {"grace_seconds": self.grace_seconds}
        return CommandTask(self.command, values, objective=self.objective, **about)

    def resolved(self, name: str = "") -> "SweepSpec":
        """Return the sweep with the name of its task, so that other processes can find it, and `name` if it has none.

        Raise ValueError if no file holds the task.
        """
        spec = self if self.name else replace(self, name=name)
        if (own := self.own_task) is None:
            return spec
        module, held, file = holder_of(own, self)
        own.check_program(Path(file).parent)
        hold(f"{module}:{held}", own)
        load_from(module, file)
        return replace(spec, task=f"{module}:{held}", **_OF_COMMANDS)

    @property
    def task_name(self) -> str:
        """Return the name of the task; the sweep must be `resolved`."""
        assert isinstance(self.task, str), "the sweep must be resolved"
        return self.task

    def job(self, cluster: str, overrides: Sequence[str]) -> JobSpec:
        """Compose a job of the sweep's task."""
        return compose_job([f"cluster={cluster}", *overrides], self.task_name)

    def labels(self, scale: Scale) -> list[str]:
        """Return the display names of the configurations at `scale`, in which different values look different."""
        return labels([self._naming(c) for c in self.configurations_at(scale)], task_named(self.task_name))

    def _naming(self, configuration: Configuration) -> dict[str, Value]:
        """Return the overrides that name `configuration`."""
        return {key: value for key, value in configuration.overrides.items() if not self.named_by or key in self.named_by}

    def scale(self, name: ScaleName) -> Scale:
        """Return the smoke or the paper scale, or the one of them that there is; without any, one seed."""
        own, other = (self.smoke, self.paper) if name is ScaleName.smoke else (self.paper, self.smoke)
        return own or other or Scale((), seeds=1)

    def configurations_at(self, scale: Scale) -> Sequence[Configuration]:
        """Return the configurations at `scale`."""
        return scale.configurations or self.configurations

    def space_at(self, scale: Scale) -> list[Dimension]:
        """Return the space, with the dimensions that `scale` replaces."""
        own = {d.key: d for d in scale.space}
        return [own.get(d.key, d) for d in self.space]


@dataclass(frozen=True)
class Trial:
    """One configuration with one seed. `signature` is its run ID and names its folder."""

    number: int
    label: str
    seed: int
    values: dict[str, Any]  # the configuration as plain values; watching a sweep builds no object
    signature: str
    params: Params = field(default_factory=dict)  # what a search chose
    configuration_number: int = -1  # in a search, the number of its first trial; else -1
    overrides: list[str] = field(default_factory=list)  # key=value of all that makes it; [] if an earlier version planned it

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the configuration: another process builds its own, once it has found the task."""
        return {name: value for name, value in vars(self).items() if name != "config"}

    @property
    def name(self) -> str:
        """Return the name that it has everywhere, such as 03-depth2-seed43."""
        return trial_name(self.number, self.label, self.seed)

    @cached_property
    def config(self) -> Any:
        """Return the configuration to train."""
        return from_dict(self.values)

    @cached_property
    def configuration(self) -> str:
        """Return what its configuration has in common over seeds and with no other; labels may be alike."""
        if self.configuration_number >= 0:
            return str(self.configuration_number)
        return json.dumps({key: value for key, value in self.values.items() if key != "seed"}, sort_keys=True)

    @property
    def known_config(self) -> Any | None:
        """Return the configuration, or None if only other code can build it and must run it."""
        try:
            return self.config
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    @property
    def epochs(self) -> int:
        """Return how many epochs it trains, or steps if its configuration counts these."""
        return length(self.values)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, under the keys of version 0.1."""
        return {_OLD_KEYS.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Trial":
        """Build a trial from the values of `to_dict`; raise TypeError if one is of another type."""
        found = build(Trial, {_KEYS.get(k, k): v for k, v in values.items()})
        if not _RUN_ID.fullmatch(found.signature):  # it names a folder
            raise TypeError(f"signature must be letters, digits, _, . and -; got {found.signature[:60]!r}")
        key = fidelity(found.values)
        if checked(int, found.values.get(key), f"values.{key}") < 1:
            raise TypeError(f"values.{key} must be at least 1; got {found.epochs}")
        return found


@dataclass(frozen=True)
class Search:
    """How a search chooses configurations: all that a worker needs to choose the next."""

    space: list[Dimension]
    base: dict[str, Any]  # configuration that the search varies
    sampler: str
    max_trials: int  # configurations to try
    seeds: int  # per configuration at most; only the leaders get more than one
    costs: bool  # whether device-hours are a second objective
    budget_hours: float | None  # device-hours; no run begins that could exceed them at the most expensive epoch known
    digest: str  # identifies space and base; with others it is another search
    hours_per_epoch: float | None = None  # expected device-hours per epoch; None if unknown
    overrides: list[str] = field(default_factory=list)  # key=value of what it varies
    max_failures: int = MAX_FAILURES  # the search chooses nothing more once so many runs have failed or have no objective
    size: int | None = None  # configurations in the space, if all of them are tried; None if there are more

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, under the keys of version 0.1."""
        return {_OLD_KEYS.get(k, k): v for k, v in asdict(self).items()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Search":
        """Build a search from the values of `to_dict`; raise TypeError if one is of another type."""
        return build(Search, {_KEYS.get(k, k): v for k, v in values.items()})

    def trial(self, number: int, configuration_number: int, params: Params, seed: int, beside: Sequence[Params] = ()) -> Trial:
        """Build the trial of `params` and `seed`, numbered and labelled so that it looks different from those `beside` it."""
        params = {d.key: params[d.key] for d in self.space if d.key in params}
        values = applied(self.base, params, seed)
        name = (f"#{configuration_number} " if configuration_number else "baseline: ") + label(params, task_of(values), beside)
        overrides = [*self.overrides, *(f"{key}={value}" for key, value in params.items()), f"seed={seed}"]
        return Trial(number, name, seed, values, signature(from_dict(values)), params, configuration_number, overrides)


Identify = Callable[[Sequence[Any]], Sequence[Any]]
Say = Callable[[Sequence[str]], object]


def discard(lines: Sequence[str]) -> None:
    """Show no lines."""


def as_they_are(configs: Sequence[Any]) -> Sequence[Any]:
    """Return configurations without identifying their data."""
    return configs


def check_overrides(spec: SweepSpec, keys: set[str], overrides: Sequence[str]) -> None:
    """Raise ValueError at an override of a key that the sweep itself sets."""
    swept = keys | {"seed", "cluster", "run_dir", "task"}
    for override in overrides:
        key = override.partition("=")[0]
        if key in swept:
            raise ValueError(f"{key} must not be overridden, because {spec.name} sets it; got {override}")


def grid_of(spec: SweepSpec, scale: Scale, cluster: str, overrides: Sequence[str], say: Say = discard) -> SweepSpec:
    """Return a sweep over the whole grid; the unchanged configuration, if in it, comes first.

    `say` gets lines about dimensions that are left out. Raise ValueError if the space makes no sense.
    """
    train = spec.job(cluster, [*scale.overrides, *overrides]).train
    space, lines = checked_space(spec.space_at(scale), train)
    say(lines)
    base = to_dict(train)
    found = grid_configurations(space, base)
    published = baseline(space, base)
    found = [p for p in found if p == published] + [p for p in found if p != published]
    return replace(spec, configurations=[Configuration(p) for p in found], space=())


def build_search(
    spec: SweepSpec,
    scale: Scale,
    cluster: str,
    overrides: Sequence[str],
    rungs: Sequence[int],
    *,
    sampler: str,
    max_trials: int,
    seeds: int,
    costs: bool = False,
    budget_hours: float | None = None,
    max_failures: int = MAX_FAILURES,
    identified: Identify = as_they_are,
    say: Say = discard,
) -> Search:
    """Build the search; raise ValueError if its space makes no sense: sweeps/spec/check.py."""
    check_overrides(spec, {d.key for d in spec.space_at(scale)}, overrides)
    train = spec.job(cluster, [*scale.overrides, *overrides]).train
    space, lines = checked_space(spec.space_at(scale), train, costs)
    say(lines)
    if chosen := {d.key for d in space} & {task_of(train).KEYS.get("data_root"), task_of(train).KEYS.get("fingerprint")}:
        raise ValueError(
            f"a search must not choose the data, which are identified when it is planned; got {min(map(str, chosen))}: use configurations"
        )
    refuse_chosen_weights(train, [d.key for d in space])
    (train,) = identified([train])
    train = task_of(train).probed_at(train, rungs)
    base = to_dict(train)
    text = json.dumps([identity(train), [d.identity() for d in space]], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    size = count_runs(space, base, max_trials)
    most, given = max_trials if size is None else size, [*scale.overrides, *overrides]
    return Search(space, base, sampler, most, seeds, costs, budget_hours, digest, overrides=given, max_failures=max_failures, size=size)


def new_runs(space: Sequence[Dimension], base: dict[str, Any]) -> Iterator[Params]:
    """Yield configurations of the space; all whose runs differ, if it can be listed."""
    fixed = set(neutral_keys(space, base)) - {d.when[0] for d in space if d.when is not None}
    changing = [d for d in space if d.key not in fixed]
    return iter(found) if (found := all_configurations(changing, base)) is not None else spread_out(changing, base)


def count_runs(space: Sequence[Dimension], base: dict[str, Any], most: int) -> int | None:
    """Return how many different runs the space has for one seed, or None if more than `most`."""
    found: set[str] = set()
    for params in new_runs(space, base):
        found.add(signature(from_dict(applied(base, params, FIRST_SEED))))
        if len(found) > most:
            return None
    return len(found)


def build_trials(
    spec: SweepSpec,
    scale: Scale,
    seeds: int,
    cluster: str,
    overrides: Sequence[str],
    rungs: Sequence[int] = (),
    identified: Identify = as_they_are,
) -> list[Trial]:
    """Build all trials, seed by seed: a half-done sweep then compares like with like.

    Raise ValueError at an override of a swept key, a broken rule, or two equal configurations.
    """
    configurations = spec.configurations_at(scale)
    check_overrides(spec, {key for configuration in configurations for key in configuration.overrides}, overrides)
    names = spec.labels(scale)
    if spec.named_by and (twice := [called for called, n in Counter(names).items() if n > 1]):
        rule = "differ in the keys that name them (named_by)"
        raise ValueError(f"configurations of {spec.name} must {rule}; got {twice[0]} {names.count(twice[0])} times")
    trials: list[Trial] = []
    known: dict[str, str] = {}
    # Compose once per configuration: its seeds differ in nothing else.
    composer = Composer(lambda own: spec.job(cluster, [*scale.overrides, *own, *overrides]), task_named(spec.task_name))
    composed = list(identified([composer.train(configuration.overrides) for configuration in configurations]))
    own = [[f"{key}={value}" for key, value in configuration.overrides.items()] for configuration in configurations]
    given = [[*scale.overrides, *words, *overrides] for words in own]
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for called, train, words in zip(names, composed, given, strict=True):
            config = task_of(train).probed_at(replace(train, seed=seed), rungs)
            name = signature(config)
            if name in known:
                raise ValueError(f"configurations of {spec.name} must differ; got the same configuration for {known[name]} and {called}")
            known[name] = called
            trials.append(Trial(len(trials), called, seed, to_dict(config), name, overrides=[*words, f"seed={seed}"]))
    return trials
