"""A sweep as a question, at two scales, over seeds: configurations to compare, or a space to search; and the trials that follow from it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from typing import Any

from cnnjepa.run.identity import DEFAULT_TASK, from_dict, identity, signature, to_dict
from jobs.cluster import JobSpec
from jobs.config import compose_job
from jobs.task import task_named, task_of
from sweeps.spec.space import Dimension, Params, Value, all_configurations, applied, baseline, grid_configurations, label

FIRST_SEED = 42  # the paper's one seed
SAMPLERS = ("tpe", "random", "gp", "grid")
# Keys of sweep.json and of a choice's file, which are those of version 0.1, and their names here.
_KEYS = {"setting": "label", "point": "configuration_number", "points": "max_trials"}
_OLD_KEYS = {new: old for old, new in _KEYS.items()}


class ScaleName(Enum):
    """smoke runs in minutes on two cores; paper is what the paper ran."""

    smoke = "smoke"
    paper = "paper"


@dataclass(frozen=True)
class Scale:
    """Overrides that all trials share at one scale, and how many seeds a configuration gets by default, in a search at most.

    Of a search also how many configurations it tries (`max_trials`), and the dimensions that are others at this scale, by their keys.
    `configurations` stand in place of the sweep's where they are others at this scale.
    """

    overrides: Sequence[str]
    seeds: int
    max_trials: int = 0
    space: Sequence[Dimension] = ()
    configurations: Sequence["Configuration"] = ()


@dataclass(frozen=True)
class Configuration:
    """One configuration of the sweep: what it sets, and what the paper printed for it, by metric (percent) or cost (hours).

    `best_of_many` where the paper's scores are each the best of several runs. What a configuration is called follows from what it sets.
    """

    overrides: Mapping[str, Value]
    paper: Mapping[str, float] = field(default_factory=dict)
    best_of_many: bool = False


@dataclass(frozen=True)
class SweepSpec:
    """A question, the configurations or the space that answer it, and the metric by which they are ranked (on held-out training labels).

    `costs` are what a run cost, by the names of results.csv, that belong to the answer: they get columns of their own, and a picture in
    which the headline stands against the first. `prune_on` are names of early warnings (search/warnings.py) that end a run at a probe.
    A configuration is called by the values that it sets of the keys `named_by`, or of all keys where there are none. `task` is the
    module that trains: jobs/task.py. It also gives the `objective` and the `headline` where they are left out.
    """

    name: str
    question: str
    smoke: Scale
    paper: Scale
    configurations: Sequence[Configuration] = ()
    space: Sequence[Dimension] = ()
    objective: str = ""
    headline: Sequence[str] | None = None
    costs: Sequence[str] = ()
    prune_on: Sequence[str] = ()
    named_by: Sequence[str] = ()
    task: str = DEFAULT_TASK

    def job(self, cluster: str, overrides: Sequence[str]) -> JobSpec:
        """Return a run of the sweep's task with these overrides."""
        return compose_job([f"cluster={cluster}", *overrides], self.task)

    def label(self, configuration: Configuration) -> str:
        """What `configuration` is called in tables and pictures."""
        return label(
            {key: value for key, value in configuration.overrides.items() if not self.named_by or key in self.named_by},
            task_named(self.task),
        )

    def scale(self, name: ScaleName) -> Scale:
        """The scale of that name."""
        return self.smoke if name is ScaleName.smoke else self.paper

    def configurations_at(self, scale: Scale) -> Sequence[Configuration]:
        """The configurations of a scale."""
        return scale.configurations or self.configurations

    def space_at(self, scale: Scale) -> list[Dimension]:
        """The space of a scale."""
        own = {d.key: d for d in scale.space}
        return [own.get(d.key, d) for d in self.space]


@dataclass(frozen=True)
class Trial:
    """One configuration and seed; `signature` of its TrainConfig is its identity and its folder's name."""

    number: int
    label: str
    seed: int
    values: dict[str, Any]  # the TrainConfig as plain values: who only watches a sweep builds none
    signature: str
    params: Params = field(default_factory=dict)  # of a search: what was chosen
    configuration_number: int = -1  # of a search: the number of its first trial; -1 for what was given and not chosen

    @cached_property
    def config(self) -> Any:
        """What the trial trains."""
        return from_dict(self.values)

    @property
    def epochs(self) -> int:
        """Of the run."""
        return int(self.values["epochs"])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {_OLD_KEYS.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Trial":
        """What `to_dict` gave."""
        return Trial(**{_KEYS.get(k, k): v for k, v in values.items()})


@dataclass(frozen=True)
class Search:
    """How configurations are chosen while the sweep runs; all that a worker needs to choose the next one."""

    space: list[Dimension]
    base: dict[str, Any]  # the configuration whose keys are changed
    sampler: str
    max_trials: int  # configurations to try
    seeds: int  # of a configuration, at most: more only for those that are still among the best
    costs: bool  # whether device-hours are a second objective
    budget_hours: float | None  # device-hours: no run is begun that could take the search above it, at the most expensive epoch known
    digest: str  # names the space and the base: with others it is another search
    hours_per_epoch: float | None = None  # device-hours that an epoch is expected to cost; None where that is not known beforehand

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {_OLD_KEYS.get(k, k): v for k, v in asdict(self).items()}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Search":
        """What `to_dict` gave."""
        known = {_KEYS.get(k, k): v for k, v in values.items()}
        return Search(**{**known, "space": [Dimension.from_dict(d) for d in values["space"]]})

    def trial(self, number: int, configuration_number: int, params: Params, seed: int) -> Trial:
        """Return the trial of a configuration and a seed."""
        params = {d.key: params[d.key] for d in self.space if d.key in params}
        values = applied(self.base, params, seed)
        name = (f"#{configuration_number} " if configuration_number else "baseline: ") + label(params, task_of(values))
        return Trial(number, name, seed, values, signature(from_dict(values)), params, configuration_number)


def check_overrides(spec: SweepSpec, keys: set[str], overrides: Sequence[str]) -> None:
    """Raise ValueError at an override of what the sweep itself sets."""
    swept = keys | {"seed", "cluster", "run_dir", "task"}
    for override in overrides:
        key = override.partition("=")[0]
        if key in swept:
            raise ValueError(f"{key} must not be overridden, because {spec.name} sets it; got {override}")


def grid_of(spec: SweepSpec, scale: Scale, cluster: str, overrides: Sequence[str]) -> SweepSpec:
    """The sweep that tries every combination of the space's grid; the unchanged configuration first where it is one of them."""
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
) -> Search:
    """The search of `spec`; its trial 0 is the configuration without changes. Raises ValueError where that is not in the space."""
    space = spec.space_at(scale)
    for dimension in space:
        dimension.check()
    check_overrides(spec, {d.key for d in space}, overrides)
    train = spec.job(cluster, [*scale.overrides, *overrides]).train
    train = task_of(train).probed_at(train, rungs)
    base = to_dict(train)
    baseline(space, base)
    max_trials = min(max_trials, len(all_configurations(space, base) or range(max_trials)))
    text = json.dumps([identity(train), [asdict(d) for d in space]], sort_keys=True)
    return Search(space, base, sampler, max_trials, seeds, costs, budget_hours, hashlib.sha256(text.encode()).hexdigest()[:12])


def build_trials(
    spec: SweepSpec, scale: Scale, seeds: int, cluster: str, overrides: Sequence[str], rungs: Sequence[int] = ()
) -> list[Trial]:
    """All trials, one seed of every configuration before the next seed, so that a half-done sweep compares like with like.

    `overrides` come from the command line and hold for every trial. Raises ValueError at an override of a swept key, at a broken rule, and
    where two configurations are the same.
    """
    configurations = spec.configurations_at(scale)
    check_overrides(spec, {key for configuration in configurations for key in configuration.overrides}, overrides)
    labels = [spec.label(configuration) for configuration in configurations]
    if twice := [called for called in labels if labels.count(called) > 1]:
        rule = "differ in the keys that name them (named_by)"
        raise ValueError(f"configurations of {spec.name} must {rule}; got {twice[0]} {labels.count(twice[0])} times")
    trials: list[Trial] = []
    known: dict[str, str] = {}
    # Composed once per configuration: its seeds differ in nothing else.
    composed = []
    for configuration in configurations:
        own = [f"{key}={value}" for key, value in configuration.overrides.items()]
        composed.append(spec.job(cluster, [*scale.overrides, *own, *overrides]).train)
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for called, train in zip(labels, composed, strict=True):
            config = task_of(train).probed_at(replace(train, seed=seed), rungs)
            name = signature(config)
            if name in known:
                raise ValueError(f"configurations of {spec.name} must differ; got the same configuration for {known[name]} and {called}")
            known[name] = called
            trials.append(Trial(len(trials), called, seed, to_dict(config), name))
    return trials
