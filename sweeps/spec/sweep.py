"""A sweep: a question, the configurations or the space that answer it, and its trials."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from typing import Any

from cnnjepa.run.identity import DEFAULT_TASK, from_dict, identity, signature, to_dict
from cnnjepa.run.typed import build, checked
from jobs.cluster import JobSpec
from jobs.config import compose_job
from jobs.task import task_named, task_of
from sweeps.spec.space import Dimension, Params, Value, all_configurations, applied, baseline, grid_configurations, label

FIRST_SEED = 42  # the paper's one seed
SAMPLERS = ("multi_fidelity", "tpe", "random", "gp", "grid")  # the first is the default
# Keys of version 0.1, which sweep.json and points/ keep -> their names here.
_KEYS = {"setting": "label", "point": "configuration_number", "points": "max_trials"}
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


@dataclass(frozen=True)
class Configuration:
    """One configuration of a sweep; what it sets also names it."""

    overrides: Mapping[str, Value]
    paper: Mapping[str, float] = field(default_factory=dict)  # the paper's figures by metric (percent) or cost (hours)
    best_of_many: bool = False  # each of the paper's scores is the best of several runs


@dataclass(frozen=True)
class SweepSpec:
    """A question, and the configurations or the space that answer it."""

    name: str
    question: str
    smoke: Scale
    paper: Scale
    configurations: Sequence[Configuration] = ()
    space: Sequence[Dimension] = ()
    objective: str = ""  # metric that ranks configurations, on held-out labels; "": the task's
    headline: Sequence[str] | None = None  # metrics of the table; None: the task's
    costs: Sequence[str] = ()  # costs in results.csv that get a column; the headline is plotted against the first
    prune_on: Sequence[str] = ()  # early warnings that end a run at a probe
    named_by: Sequence[str] = ()  # keys that name a configuration; all if empty
    task: str = DEFAULT_TASK  # module that trains: jobs/task.py

    def job(self, cluster: str, overrides: Sequence[str]) -> JobSpec:
        """Compose a job of the sweep's task."""
        return compose_job([f"cluster={cluster}", *overrides], self.task)

    def label(self, configuration: Configuration) -> str:
        """Return the display name of `configuration`."""
        naming = {key: value for key, value in configuration.overrides.items() if not self.named_by or key in self.named_by}
        return label(naming, task_named(self.task))

    def scale(self, name: ScaleName) -> Scale:
        """Return the smoke or the paper scale."""
        return self.smoke if name is ScaleName.smoke else self.paper

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

    @cached_property
    def config(self) -> Any:
        """Return the configuration to train."""
        return from_dict(self.values)

    @property
    def known_config(self) -> Any | None:
        """Return the configuration, or None if only other code can build it and must run it."""
        try:
            return self.config
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    @property
    def epochs(self) -> int:
        """Return how many epochs it trains."""
        return int(self.values["epochs"])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, under the keys of version 0.1."""
        return {_OLD_KEYS.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Trial":
        """Build a trial from the values of `to_dict`; raise TypeError if one is of another type."""
        found = build(Trial, {_KEYS.get(k, k): v for k, v in values.items()})
        if not _RUN_ID.fullmatch(found.signature):  # it names a folder
            raise TypeError(f"signature must be letters, digits, _, . and -; got {found.signature[:60]!r}")
        if checked(int, found.values.get("epochs"), "values.epochs") < 1:
            raise TypeError(f"values.epochs must be at least 1; got {found.epochs}")
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

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, under the keys of version 0.1."""
        return {_OLD_KEYS.get(k, k): v for k, v in asdict(self).items()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Search":
        """Build a search from the values of `to_dict`; raise TypeError if one is of another type."""
        return build(Search, {_KEYS.get(k, k): v for k, v in values.items()})

    def trial(self, number: int, configuration_number: int, params: Params, seed: int) -> Trial:
        """Build the trial of `params` and `seed`, numbered and labelled."""
        params = {d.key: params[d.key] for d in self.space if d.key in params}
        values = applied(self.base, params, seed)
        name = (f"#{configuration_number} " if configuration_number else "baseline: ") + label(params, task_of(values))
        return Trial(number, name, seed, values, signature(from_dict(values)), params, configuration_number)


Identify = Callable[[Sequence[Any]], Sequence[Any]]


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


def grid_of(spec: SweepSpec, scale: Scale, cluster: str, overrides: Sequence[str]) -> SweepSpec:
    """Return a sweep over the whole grid; the unchanged configuration, if in it, comes first."""
    space = spec.space_at(scale)
    base = to_dict(spec.job(cluster, [*scale.overrides, *overrides]).train)
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
    identified: Identify = as_they_are,
) -> Search:
    """Build the search; raise ValueError if the unchanged configuration is not in its space."""
    space = spec.space_at(scale)
    for dimension in space:
        dimension.check()
    check_overrides(spec, {d.key for d in space}, overrides)
    train = spec.job(cluster, [*scale.overrides, *overrides]).train
    if chosen := {d.key for d in space} & {task_of(train).KEYS.get("data_root"), task_of(train).KEYS.get("fingerprint")}:
        raise ValueError(
            f"a search must not choose the data, which are identified when it is planned; got {min(map(str, chosen))}: use configurations"
        )
    (train,) = identified([train])
    train = task_of(train).probed_at(train, rungs)
    base = to_dict(train)
    baseline(space, base)
    max_trials = min(max_trials, len(all_configurations(space, base) or range(max_trials)))
    text = json.dumps([identity(train), [asdict(d) for d in space]], sort_keys=True)
    return Search(space, base, sampler, max_trials, seeds, costs, budget_hours, hashlib.sha256(text.encode()).hexdigest()[:12])


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
    labels = [spec.label(configuration) for configuration in configurations]
    if twice := [called for called in labels if labels.count(called) > 1]:
        rule = "differ in the keys that name them (named_by)"
        raise ValueError(f"configurations of {spec.name} must {rule}; got {twice[0]} {labels.count(twice[0])} times")
    trials: list[Trial] = []
    known: dict[str, str] = {}
    # Compose once per configuration: its seeds differ in nothing else.
    composed = []
    for configuration in configurations:
        own = [f"{key}={value}" for key, value in configuration.overrides.items()]
        composed.append(spec.job(cluster, [*scale.overrides, *own, *overrides]).train)
    composed = list(identified(composed))
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for called, train in zip(labels, composed, strict=True):
            config = task_of(train).probed_at(replace(train, seed=seed), rungs)
            name = signature(config)
            if name in known:
                raise ValueError(f"configurations of {spec.name} must differ; got the same configuration for {known[name]} and {called}")
            known[name] = called
            trials.append(Trial(len(trials), called, seed, to_dict(config), name))
    return trials
