"""The model of scores at several epochs: its gradient, what it learns from stopped, running and failed runs, and how far it scales."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from cnnjepa.run.folder import RunStatus
from sweeps.cli.plan import parse, plan
from sweeps.execution.scheduler import next_claim
from sweeps.search import multi_fidelity, sampler, search
from sweeps.search.multi_fidelity import Cube, Model, Run, propose
from sweeps.spec.space import Dimension, choice, real, whole
from sweeps.spec.sweep import SAMPLERS
from sweeps.state.claims import Process
from sweeps.state.view import View
from tests.support.searched import OBJECTIVE, end, searched
from tests.support.tiny_search import SWEEP

EPOCHS = 20
MIXED = [
    real("lr", 1e-4, 1e-1, log=True),
    whole("depth", 1, 4),
    choice("conv", "dense", "depthwise", "none"),
    choice("kernel", 3, 5, when=("conv", ("dense", "depthwise"))),
    real("drop", 0.0, 0.5, when=("depth", (3, 4))),
    Dimension("heads", low=1, high=64, log=True, whole=True),
    whole("batch", 32, 100, step=32),
    real("scale", 0.1, 1.0, when=("strategy", ("block",))),  # by the base, which has no such strategy
]
BASE: dict[str, Any] = {"strategy": "random", "conv": "dense", "depth": 2}
CUBE = Cube(MIXED, BASE)
LINE = Cube([real("lr", 0.0, 1.0)], {})


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def on_line(x: float, **more: Any) -> Run:
    return Run({"lr": x}, 42, EPOCHS, **more)


def test_a_point_of_the_cube_and_its_choices_are_the_same_thing() -> None:
    points = CUBE.snapped(rng().random((300, len(MIXED))))
    params = [CUBE.params(point) for point in points]
    assert np.allclose(CUBE.points(params), points, equal_nan=True, atol=1e-12)
    for chosen in params:
        assert ("kernel" in chosen) is (chosen["conv"] != "none")
        assert ("drop" in chosen) is (chosen["depth"] in (3, 4))
        assert "scale" not in chosen
        assert isinstance(chosen["heads"], int)
        assert 1 <= chosen["heads"] <= 64
        assert 1e-4 <= float(chosen["lr"]) <= 1e-1
        assert chosen["batch"] in (32, 64, 96)
    counts = [sum(p["depth"] == depth for p in params) for depth in (1, 2, 3, 4)]
    assert min(counts) > 50  # each whole number gets the same share, those at the ends too
    for corner in (0.0, 1.0):
        assert CUBE.params(np.full(len(MIXED), corner))["heads"] == (1 if corner == 0 else 64)
        assert CUBE.params(np.full(len(MIXED), corner))["batch"] == (32 if corner == 0 else 96)


def test_distances_are_at_most_one_in_a_dimension_and_do_not_depend_on_what_does_not_matter() -> None:
    points = CUBE.snapped(rng().random((100, len(MIXED))))
    x, of = CUBE.features(points)
    assert not np.isnan(x).any()
    for d in range(len(MIXED)):
        own = x[:, of == d]
        assert ((own[:, None] - own[None]) ** 2).sum(-1).max(initial=0) <= 1 + 1e-9
    without = np.isnan(points[:, 3])
    assert len(np.unique(x[without][:, of == 3], axis=0)) == 1


def test_the_gradient_of_the_fit_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """L-BFGS would stop early, in silence, if one of its parts were wrong."""
    worst: list[float] = []
    minimize = multi_fidelity.minimize

    def compared(cost: Any, start: Any, **options: Any) -> Any:
        at = start + 0.2 * rng(1).normal(size=len(start))
        worst.append(np.abs(approx_fprime(at, lambda z: cost(z)[0], 1e-6) - cost(at)[1]).max())
        return minimize(cost, start, **options)

    monkeypatch.setattr(multi_fidelity, "minimize", compared)
    points = CUBE.snapped(rng().random((15, len(MIXED))))
    runs = [Run(CUBE.params(p), 42 + i % 2, EPOCHS, {5: 10 * p[0] + i % 3, EPOCHS: 20 * p[0]}) for i, p in enumerate(points)]
    Model(CUBE, runs, rng())
    assert worst[0] < 1e-2


def test_scores_of_stopped_runs_lead_to_the_best() -> None:
    """The peak at 0.3 is seen at the rung alone: the only completed run lies far from it."""
    rung = {x / 10: 50 - 60 * abs(x / 10 - 0.3) for x in range(11)}
    runs = [on_line(x, scores={5: score}) for x, score in rung.items()]
    runs[9] = on_line(0.9, scores={5: rung[0.9], EPOCHS: 25.0})
    found = [float(propose(LINE, runs, rng(seed))["lr"]) for seed in range(10)]
    assert all(0.2 < x < 0.4 for x in found)
    blind = [dataclasses.replace(r, scores={k: v for k, v in r.scores.items() if k == EPOCHS}) for r in runs]
    assert not all(0.2 < float(propose(LINE, blind, rng(seed))["lr"]) < 0.4 for seed in range(10))


def test_a_lead_at_the_rung_that_is_lost_at_the_end_is_not_followed() -> None:
    """At the rung the best is 0.9, at the end it is 0.2."""
    runs = [on_line(x / 8, scores={5: 40 - 20 * abs(x / 8 - 0.9), EPOCHS: 70 - 40 * abs(x / 8 - 0.2)}) for x in range(9)]
    found = [float(propose(LINE, runs, rng(seed))["lr"]) for seed in range(10)]
    assert all(abs(x - 0.2) < 0.15 for x in found)


def test_what_runs_already_is_not_proposed_again() -> None:
    runs = [on_line(x / 8, scores={EPOCHS: 50 - 60 * abs(x / 8 - 0.4)}) for x in range(9)]
    places = []
    for seed in range(8):
        place = float(propose(LINE, runs, rng(seed))["lr"])
        places.append(place)
        runs.append(on_line(place, pending=True))
    apart = np.abs(np.subtract.outer(places, places)) + np.eye(len(places))
    assert apart.min() > 0.01
    model, without = Model(LINE, runs, rng()), Model(LINE, [r for r in runs if not r.pending], rng())
    at, best = np.array([[places[0]]]), np.array([[0.375]])
    assert model.improvement(at, best)[0] < 0.8 * without.improvement(at, best)[0]
    assert model.expected(at)[0] == pytest.approx(without.expected(at)[0], abs=0.05)  # a guess teaches nothing


def test_where_runs_fail_no_more_are_begun() -> None:
    """The scores rise up to 0.7, and beyond it every run fails without one."""
    runs = [on_line(x / 20, **({"failed": True} if x > 14 else {"scores": {EPOCHS: 2.0 * x}})) for x in range(21)]
    assert all(float(propose(LINE, runs, rng(seed))["lr"]) < 0.8 for seed in range(10))
    lucky = [dataclasses.replace(r, failed=False) for r in runs]
    assert any(float(propose(LINE, lucky, rng(seed))["lr"]) > 0.8 for seed in range(10))


def test_the_first_runs_are_spread_evenly() -> None:
    runs = [on_line(0.5)]
    for number in range(6):
        runs.append(on_line(float(propose(LINE, runs, rng(number))["lr"])))
    places = sorted(float(r.params["lr"]) for r in runs)
    assert max(np.diff([0, *places, 1])) < 0.35


@pytest.mark.parametrize("score", [5.0, 0.0])
def test_equal_scores_and_one_diverged_run_are_no_obstacle(score: float) -> None:
    runs = [on_line(x / 10, scores={EPOCHS: score}) for x in range(11)]
    assert 0 <= float(propose(LINE, runs, rng())["lr"]) <= 1
    runs = [on_line(x / 10, scores={EPOCHS: 50 - 60 * abs(x / 10 - 0.3)}) for x in range(11)]
    runs[10] = on_line(1.0, scores={EPOCHS: -1e12})
    assert all(abs(float(propose(LINE, runs, rng(seed))["lr"]) - 0.3) < 0.15 for seed in range(5))


def test_many_runs_are_sampled_and_the_best_are_kept() -> None:
    chance = rng()
    runs = [
        on_line(float(x), scores={5: 20.0, EPOCHS: 50 - 60 * abs(x - 0.3)}, pending=i > 2900) for i, x in enumerate(chance.random(3000))
    ]
    model = Model(LINE, runs, chance)
    assert len(model.runs) == 250
    assert len(model.data.y) <= 3 * 250
    best = sorted(runs, key=lambda r: -r.scores[EPOCHS])[:125]
    assert {id(r) for r in best} <= {id(r) for r in model.runs}
    assert abs(float(propose(LINE, runs, rng())["lr"]) - 0.3) < 0.1


def test_of_many_scores_the_last_and_those_at_halves_are_used() -> None:
    run = Run({}, 42, 200, {e: float(e) for e in range(10, 201, 10)})
    assert run.used == [(200, 200.0), (100, 100.0), (50, 50.0), (20, 20.0), (10, 10.0)]


# In a search.


def test_the_model_is_told_of_every_run_what_its_folder_says(tmp_path: Path) -> None:
    made = searched(tmp_path, [1, 2], sampler="multi_fidelity")
    view = View(made)
    for status, score, probes in (
        (RunStatus.completed, 60.0, {"e1": 30.0, "e2": 40.0}),
        (RunStatus.pruned, None, {"e1": 20.0}),
        (RunStatus.failed, None, {}),
        (RunStatus.completed, None, {"e0": 5.0, "e2": 35.0}),  # its last probe has no value; before training there is nothing to learn
    ):
        got = next_claim(view, Process.me().driver)
        assert got is not None
        with got[1]:
            end(made, got[0], score, status, **probes)
    running = next_claim(view, Process.me().driver)
    assert running is not None
    folder = made.run(running[0])
    folder.prepare(running[0].config)
    (folder.path / "metrics.jsonl").write_text(f'{{"kind": "probe", "step": 1, "epoch": 1.0, "{OBJECTIVE}": 25.0}}\n')
    told = sampler.runs(View(made))
    epochs = made.trials[0].epochs
    assert [dict(r.scores) for r in told] == [{1: 30.0, 2: 40.0, epochs: 60.0}, {1: 20.0}, {}, {2: 35.0}, {1: 25.0}]
    assert [(r.pending, r.failed) for r in told] == [(False, False), (False, False), (False, True), (False, False), (True, False)]
    assert [r.params for r in told] == [t.params for t in made.trials]
    with running[1]:
        pass


def test_workers_that_choose_one_after_the_other_never_choose_the_same(tmp_path: Path) -> None:
    made = searched(tmp_path, sampler="multi_fidelity", max_trials=30)
    view = View(made)
    for number in range(12):
        got = next_claim(view, Process.me().driver)
        assert got is not None
        with got[1]:
            end(made, got[0], 50.0 - number)
    chosen = [search.begin(view) for _ in range(18)]
    assert all(chosen)
    assert search.begin(view) is None
    assert len({t.signature for t in made.trials} | {t.signature for t in view.sweep.trials}) == 30


def planned(tmp_path: Path, *more: str) -> tuple[str, list[int]]:
    asked = parse(SWEEP, ["--cluster", "local", "--runs-dir", str(tmp_path), "epochs=8", *more])
    made, _ = plan(SWEEP, asked)
    assert made.search is not None
    if "--dry-run" not in more:
        made.write()
    return made.search.sampler, made.rungs


def test_a_search_keeps_the_sampler_that_it_began_with(tmp_path: Path) -> None:
    assert planned(tmp_path, "--dry-run") == (SAMPLERS[0], [2])
    assert planned(tmp_path, "--sampler", "tpe") == ("tpe", [2])
    assert planned(tmp_path) == ("tpe", [2])
    assert planned(tmp_path, "--sampler", "multi_fidelity") == ("multi_fidelity", [2])
    assert planned(tmp_path, "--two-objectives", "--dry-run") == ("tpe", [])
    assert planned(tmp_path, "--sampler", "gp") == ("gp", [])
    assert planned(tmp_path, "--dry-run") == ("gp", [])
