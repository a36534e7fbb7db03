"""A sweep as a question: settings to compare, at two scales, over seeds; and the trials that follow from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from typing import Any

from cnnjepa.config import TrainConfig
from cnnjepa.identity import from_dict, signature, to_dict
from jobs.compose import compose_job

FIRST_SEED = 42  # the paper's one seed
Value = str | int | float


class ScaleName(Enum):
    """smoke runs in minutes on two cores; paper is what the paper ran."""

    smoke = "smoke"
    paper = "paper"


@dataclass(frozen=True)
class Scale:
    """Overrides that all trials share at one scale, and how many seeds each setting gets by default."""

    overrides: Sequence[str]
    seeds: int


@dataclass(frozen=True)
class Setting:
    """One point of the space: what it sets, and the scores (percent) that the paper printed for it, by metric."""

    label: str
    overrides: Mapping[str, Value]
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepSpec:
    """A question, the settings that answer it, and the metric by which they are ranked (on held-out training labels)."""

    name: str
    question: str
    settings: Sequence[Setting]
    smoke: Scale
    paper: Scale
    objective: str = "linear.holdout_top1"
    headline: Sequence[str] = ("linear.test_top1", "knn.test_top1")

    def scale(self, name: ScaleName) -> Scale:
        """The scale of that name."""
        return self.smoke if name is ScaleName.smoke else self.paper


@dataclass(frozen=True)
class Trial:
    """One setting and seed; `signature` of its TrainConfig is its identity and its folder's name."""

    number: int
    setting: str
    seed: int
    values: dict[str, Any]  # the TrainConfig as plain values: who only watches a sweep builds none
    signature: str

    @cached_property
    def config(self) -> TrainConfig:
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


def build_trials(spec: SweepSpec, scale: Scale, seeds: int, cluster: str, overrides: Sequence[str]) -> list[Trial]:
    """All trials, one seed of every setting before the next seed, so that a half-done sweep compares like with like.

    `overrides` come from the command line and hold for every trial. Raises ValueError at an override of a swept key, at a broken rule, and
    where two settings are the same configuration.
    """
    swept = {key for setting in spec.settings for key in setting.overrides} | {"seed", "cluster", "run_dir"}
    for override in overrides:
        key = override.partition("=")[0]
        if key in swept:
            raise ValueError(f"{key} must not be overridden, it is what {spec.name} sets itself; got {override}")
    trials: list[Trial] = []
    known: dict[str, str] = {}
    # Composed once a setting: seeds of one setting differ in nothing else.
    composed = []
    for setting in spec.settings:
        own = [f"{key}={value}" for key, value in setting.overrides.items()]
        composed.append(compose_job([f"cluster={cluster}", *scale.overrides, *own, *overrides]).train)
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for setting, train in zip(spec.settings, composed, strict=True):
            config = replace(train, seed=seed)
            identity = signature(config)
            if identity in known:
                raise ValueError(
                    f"settings of {spec.name} must differ; got the same configuration for {known[identity]} and {setting.label}"
                )
            known[identity] = setting.label
            trials.append(Trial(len(trials), setting.label, seed, to_dict(config), identity))
    return trials
