"""A grid is composed once for each value, and gives what composing each configuration gives."""

import dataclasses
import random

import pytest

from cnnjepa.run.identity import to_dict
from jobs.cluster import JobSpec
from jobs.task import task_named
from sweeps.joint_search import SWEEP
from sweeps.spec.compose import Composer
from sweeps.spec.sweep import Configuration, build_trials, grid_of
from tests.support.tiny_sweep import sweep

LR = "optimizer.lr"


def composer(asked: list[list[str]]) -> Composer:
    def job(own: list[str]) -> JobSpec:
        asked.append(own)
        return SWEEP.job("local", [*SWEEP.smoke.overrides, *own])

    return Composer(job, task_named(SWEEP.task))  # type: ignore[arg-type]


def test_a_grid_is_what_hydra_makes_of_each_configuration_and_few_are_composed() -> None:
    grid = [c.overrides for c in grid_of(SWEEP, SWEEP.smoke, "local", []).configurations]
    assert len(grid) == 660
    asked: list[list[str]] = []
    once = composer(asked)
    trained = {repr(overrides): once.train(overrides) for overrides in grid}
    assert len(asked) < 60
    for overrides in random.Random(0).sample(grid, 6):
        own = [f"{key}={value}" for key, value in overrides.items()]
        assert to_dict(trained[repr(overrides)]) == to_dict(SWEEP.job("local", [*SWEEP.smoke.overrides, *own]).train)


@pytest.mark.parametrize(
    "configurations",
    [
        [{LR: 1}, {LR: 2}, {LR: 0.5}],
        [{"optimizer": "byol_imagenet1k"}, {LR: 0.1}, {"optimizer": "byol_imagenet1k", LR: 0.2}, {"optimizer": "byol_imagenet1k", LR: 0.3}],
        [{"probes.names": ["linear", "knn"]}, {"probes.names": ["linear"]}, {"probes.names": ["linear", "knn"], LR: 0.2}],
        [{"optimizer.warmup_epochs": 1}, {"optimizer.warmup_epochs": 2}],
        [{"data.root": "~/x"}, {"data.root": "~/y"}],
        [{LR: "1e-3"}, {LR: "1e-2"}, {LR: 0.02}],
    ],
    ids=str,
)
def test_values_of_any_type_become_what_hydra_makes_of_them(configurations: list[dict]) -> None:
    once = composer([])
    for overrides in configurations:
        own = [f"{key}={value}" for key, value in overrides.items()]
        assert to_dict(once.train(overrides)) == to_dict(SWEEP.job("local", [*SWEEP.smoke.overrides, *own]).train), overrides


@pytest.mark.parametrize("bad", [{LR: -1.0}, {LR: "fast"}, {LR: float("inf")}, {"method.predictor.depth": 0}])
def test_a_value_that_breaks_a_rule_is_refused_after_good_ones_of_its_key(bad: dict) -> None:
    once = composer([])
    once.train({LR: 0.1})
    once.train({"method.predictor.depth": 1})
    with pytest.raises(ValueError, match=r"(lr|depth) must"):
        once.train(bad)


def test_equal_values_of_two_forms_are_one_configuration_and_named_as_such() -> None:
    spec = dataclasses.replace(sweep(), configurations=[Configuration({LR: 1}), Configuration({LR: 1.0})])
    with pytest.raises(ValueError, match="must differ; got the same configuration for"):
        build_trials(spec, spec.smoke, 1, "local", [])
    close = dataclasses.replace(sweep(), configurations=[Configuration({LR: v}) for v in (0.0999, 0.09999, 0.1)])
    assert [t.label for t in build_trials(close, close.smoke, 1, "local", [])] == ["lr 0.0999", "lr 0.09999", "lr 0.1"]
