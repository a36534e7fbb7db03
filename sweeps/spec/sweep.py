"""A sweep as a question, at two scales, over seeds: settings to compare, or a space to search; and the trials that follow from it."""

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
from sweeps.spec.space import Dimension, Params, Value, all_points, applied, baseline, grid_points, label

FIRST_SEED = 42  # the paper's one seed
SAMPLERS = ("tpe", "random", "gp", "grid")


class ScaleName(Enum):
    """smoke runs in minutes on two cores; paper is what the paper ran."""

    smoke = "smoke"
    paper = "paper"


@dataclass(frozen=True)
class Scale:
    """Overrides that all trials share at one scale, and how many seeds a setting gets by default, in a search at most.

    Of a search also how many settings it tries, and the dimensions that are others at this scale, by their keys. `settings` stand in place
    of the sweep's where they are others at this scale.
    """

    overrides: Sequence[str]
    seeds: int
    points: int = 0
    space: Sequence[Dimension] = ()
    settings: Sequence["Setting"] = ()


@dataclass(frozen=True)
class Setting:
    """One point of the space: what it sets, and what the paper printed for it, by metric (percent) or cost (hours).

    `best_of_many` where the paper's scores are each the best of several runs. What a setting is called follows from what it sets.
    """

    overrides: Mapping[str, Value]
    paper: Mapping[str, float] = field(default_factory=dict)
    best_of_many: bool = False


@dataclass(frozen=True)
class SweepSpec:
    """A question, the settings or the space that answer it, and the metric by which they are ranked (on held-out training labels).

    `costs` are what a run cost, by the names of results.csv, that belong to the answer: they get columns of their own, and a picture in
    which the headline stands against the first. `prune_on` are names of early warnings (search/warnings.py) that end a run at a probe.
    A setting is called by the values that it sets of the keys `named_by`, or of all keys where there are none. `task` is the module that
    trains: jobs/task.py. It also gives the `objective` and the `headline` where they are left out.
    """

    name: str
    question: str
    smoke: Scale
    paper: Scale
    settings: Sequence[Setting] = ()
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

    def label(self, setting: Setting) -> str:
        """What `setting` is called in tables and pictures."""
        return label(
            {key: value for key, value in setting.overrides.items() if not self.named_by or key in self.named_by}, task_named(self.task)
        )

    def scale(self, name: ScaleName) -> Scale:
        """The scale of that name."""
        return self.smoke if name is ScaleName.smoke else self.paper

    def settings_at(self, scale: Scale) -> Sequence[Setting]:
        """The settings of a scale."""
        return scale.settings or self.settings

    def space_at(self, scale: Scale) -> list[Dimension]:
        """The space of a scale."""
        own = {d.key: d for d in scale.space}
        return [own.get(d.key, d) for d in self.space]


@dataclass(frozen=True)
class Trial:
    """One setting and seed; `signature` of its TrainConfig is its identity and its folder's name."""

    number: int
    setting: str
    seed: int
    values: dict[str, Any]  # the TrainConfig as plain values: who only watches a sweep builds none
    signature: str
    params: Params = field(default_factory=dict)  # of a search: what was chosen
    point: int = -1  # of a search: the number of the first trial of the setting; -1 for what was given and not chosen

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
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Trial":
        """What `to_dict` gave."""
        return Trial(**values)


@dataclass(frozen=True)
class Search:
    """How settings are chosen while the sweep runs; all that a worker needs to choose the next one."""

    space: list[Dimension]
    base: dict[str, Any]  # the configuration whose keys are changed
    sampler: str
    points: int  # settings to try
    seeds: int  # of a setting, at most: more only for those that are still among the best
    costs: bool  # whether device-hours are a second objective
    budget_hours: float | None  # device-hours: no run is begun that could take the search above it, at the dearest epoch known
    digest: str  # names what points are points of: with another space, or another base, they are another search's
    hours_per_epoch: float | None = None  # device-hours that an epoch is expected to cost; None where that is not known beforehand

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Search":
        """What `to_dict` gave."""
        return Search(**{**values, "space": [Dimension.from_dict(d) for d in values["space"]]})

    def trial(self, number: int, point: int, params: Params, seed: int) -> Trial:
        """The trial of a point and seed."""
        params = {d.key: params[d.key] for d in self.space if d.key in params}
        values = applied(self.base, params, seed)
        name = f"#{point} {label(params, task_of(values))}" if point else f"baseline: {label(params, task_of(values))}"
        return Trial(number, name, seed, values, signature(from_dict(values)), params, point)


def check_overrides(spec: SweepSpec, keys: set[str], overrides: Sequence[str]) -> None:
    """Raise ValueError at an override of what the sweep itself sets."""
    swept = keys | {"seed", "cluster", "run_dir", "task"}
    for override in overrides:
        key = override.partition("=")[0]
        if key in swept:
            raise ValueError(f"{key} must not be overridden, it is what {spec.name} sets itself; got {override}")


def grid_of(spec: SweepSpec, scale: Scale, cluster: str, overrides: Sequence[str]) -> SweepSpec:
    """The sweep that tries every combination of the space's grid, as settings; the unchanged setting first where it is one of them."""
    space = spec.space_at(scale)
    base = to_dict(spec.job(cluster, [*scale.overrides, *overrides]).train)
    points = grid_points(space, base)
    published = baseline(space, base)
    points = [p for p in points if p == published] + [p for p in points if p != published]
    return replace(spec, settings=[Setting(p) for p in points], space=())


def build_search(
    spec: SweepSpec,
    scale: Scale,
    cluster: str,
    overrides: Sequence[str],
    rungs: Sequence[int],
    *,
    sampler: str,
    points: int,
    seeds: int,
    costs: bool = False,
    budget_hours: float | None = None,
) -> Search:
    """The search of `spec`; its trial 0 is the setting without changes. Raises ValueError where that is not in the space."""
    space = spec.space_at(scale)
    for dimension in space:
        dimension.check()
    check_overrides(spec, {d.key for d in space}, overrides)
    train = spec.job(cluster, [*scale.overrides, *overrides]).train
    train = task_of(train).probed_at(train, rungs)
    base = to_dict(train)
    baseline(space, base)
    points = min(points, len(all_points(space, base) or range(points)))
    text = json.dumps([identity(train), [asdict(d) for d in space]], sort_keys=True)
    return Search(space, base, sampler, points, seeds, costs, budget_hours, hashlib.sha256(text.encode()).hexdigest()[:12])


def build_trials(
    spec: SweepSpec, scale: Scale, seeds: int, cluster: str, overrides: Sequence[str], rungs: Sequence[int] = ()
) -> list[Trial]:
    """All trials, one seed of every setting before the next seed, so that a half-done sweep compares like with like.

    `overrides` come from the command line and hold for every trial. Raises ValueError at an override of a swept key, at a broken rule, and
    where two settings are the same configuration.
    """
    settings = spec.settings_at(scale)
    check_overrides(spec, {key for setting in settings for key in setting.overrides}, overrides)
    labels = [spec.label(setting) for setting in settings]
    if twice := [called for called in labels if labels.count(called) > 1]:
        rule = "be told apart by what they set of the keys that name them (named_by)"
        raise ValueError(f"settings of {spec.name} must {rule}; got {twice[0]} {labels.count(twice[0])} times")
    trials: list[Trial] = []
    known: dict[str, str] = {}
    # Composed once a setting: seeds of one setting differ in nothing else.
    composed = []
    for setting in settings:
        own = [f"{key}={value}" for key, value in setting.overrides.items()]
        composed.append(spec.job(cluster, [*scale.overrides, *own, *overrides]).train)
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for called, train in zip(labels, composed, strict=True):
            config = task_of(train).probed_at(replace(train, seed=seed), rungs)
            name = signature(config)
            if name in known:
                raise ValueError(f"settings of {spec.name} must differ; got the same configuration for {known[name]} and {called}")
            known[name] = called
            trials.append(Trial(len(trials), called, seed, to_dict(config), name))
    return trials
