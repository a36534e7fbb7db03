"""The figures of a search: its direction, and options of any type."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import plotly.graph_objects as go
import pytest

from sweeps.report import html
from sweeps.report.optuna_study import study_of
from sweeps.report.search_figures import IMPORTANCES, _for_page, importances, of_first_objective, sample, search_figures, slice_of
from sweeps.search import sampler
from sweeps.spec.space import Dimension, choice, real, whole
from sweeps.spec.sweep import Trial
from sweeps.state.view import View
from tests.support.searched import end, searched
from tests.support.tiny_search import SWEEP

MAXIMIZE = optuna.study.StudyDirection.MAXIMIZE


def ended(path: Path, space: Sequence[Dimension], score: Callable[[Trial], float], costs: bool, runs: int) -> View:
    """A search of random configurations that have those scores; each costs as much as its number says."""
    made = searched(path, spec=dataclasses.replace(SWEEP, space=space), max_trials=runs, costs=costs)
    drawing, known = dataclasses.replace(made.search, sampler="random"), {made.trials[0].signature}  # type: ignore[type-var]
    for draw in range(20 * runs):
        if len(made.trials) == runs:
            break
        number = made.next_number
        trial = made.search.trial(number, number, sampler.suggest([], drawing, number, draw), 42)  # type: ignore[union-attr]
        if trial.signature not in known:
            known.add(trial.signature)
            made.register(trial)
            made.grow()
    for trial in made.trials:
        end(made, trial, score(trial), hours=1 + trial.number / 10, e1=score(trial) / 2)
    return View(made)


def good_only_at_one_end(trial: Trial) -> float:
    """The learning rate makes the best scores, the depth the worst: low importance at one end is high at the other."""
    rate = math.log10(float(trial.values["optimizer"]["lr"]) / 0.0005) / 2  # 0 to 1
    depth = trial.values["method"]["predictor"]["depth"]
    return 50 + 20 * max(rate - 0.7, 0) - (40 if depth == 3 else 0)


RATE_AND_DEPTH = [real("optimizer.lr", 0.0005, 0.05, log=True), whole("method.predictor.depth", 1, 3)]


@pytest.mark.slow
def test_a_page_of_two_objectives_shows_of_the_scores_what_a_page_of_one_shows(tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    for costs in (False, True):
        view = ended(tmp_path / str(costs), RATE_AND_DEPTH, good_only_at_one_end, costs, 40)
        study = of_first_objective(study_of(view))
        assert study.direction is MAXIMIZE
        weights = importances(study, ["optimizer.lr", "method.predictor.depth"])
        assert next(iter(weights)) == "optimizer.lr", "of the best tenth, and not of the worst"
        found.append({heading: json.loads(figure.to_json()) for heading, figure in search_figures(view)})
    one, two = found
    assert two.pop("Accuracy against device-hours")
    assert one == two
    (points, best) = one["Optimization history"]["data"][:2]
    assert best["name"] == "Best Value"
    assert max(points["y"]) == best["y"][-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "space",
    [
        [choice("encoder.sync_bn", False, True), whole("epochs", 2, 8)],
        [choice("optimizer.warmup_epochs", 0.5, 1), choice("encoder.sync_bn", False, True)],
        [choice("encoder.sync_bn", False, True), choice("method.predictor.conv", "depthwise", "pointwise")],
    ],
    ids=["boolean and whole", "mixed numbers and boolean", "boolean and words"],
)
def test_booleans_and_mixed_numbers_are_drawn(space: list[Dimension], tmp_path: Path) -> None:
    for costs in (False, True):
        view = ended(tmp_path / str(costs), space, lambda t: 60.0 - t.number % 3 - t.number / 100, costs, 14 if space[1].whole else 4)
        found = dict(search_figures(view))
        slices = {heading: set(figure.data[0].x) for heading, figure in found.items() if heading.startswith("Slice: ")}
        assert slices["Slice: sync_bn"] == {"True", "False"}  # and no quotes
        assert len(slices) == 2
        assert any(heading.startswith("Contours: ") for heading in found) == bool(space[1].whole)  # of options alone there is none
        html.build(view)


def test_options_that_have_no_order_are_drawn_as_texts() -> None:
    study = optuna.create_study(direction="maximize")
    kind = optuna.distributions.CategoricalDistribution([None, 1, "a", True])
    for i, value in enumerate(kind.choices):
        study.add_trial(optuna.trial.create_trial(params={"x": value, "y": i}, distributions={"x": kind, "y": Y}, value=float(i)))
    drawn = of_first_objective(study)
    assert [t.params["x"] for t in drawn.trials] == ["None", "1", "a", "True"]
    assert [t.params["y"] for t in drawn.trials] == [0, 1, 2, 3]
    optuna.visualization.plot_contour(drawn, ["x", "y"])
    optuna.visualization.plot_slice(drawn, ["x", "y"])


Y = optuna.distributions.IntDistribution(0, 500)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_a_sample_of_many_runs_goes_from_the_best_to_the_worst_and_says_so(direction: str) -> None:
    study = optuna.create_study(direction=direction)
    study.add_trials([optuna.trial.create_trial(params={"y": i}, distributions={"y": Y}, value=float(i * 7 % 300)) for i in range(300)])
    some, said = sample(study.trials, study, 30)
    values = {t.value for t in some.trials}
    assert said == ", of 30 of 300 runs, from the best to the worst"
    assert len(values) == 30
    assert {0.0, 299.0} <= values
    whole_study, nothing = sample(study.trials[:30], study, 30)
    assert (len(whole_study.trials), nothing) == (30, "")


def test_on_a_phone_numbers_are_whole_and_legends_take_no_width() -> None:
    bars = _for_page(IMPORTANCES, go.Figure(go.Bar(x=[0.04, 0.89], y=["b", "a"], orientation="h")))
    assert bars.data[0].cliponaxis is False
    assert bars.layout.xaxis.range[1] > 1.1 * 0.89
    assert bars.layout.legend.orientation == "h"


def test_of_few_runs_no_importance_is_told() -> None:
    """Of 12 runs Optuna has called the depth the most important, where scores follow the learning rate alone."""
    kinds = {"rate": optuna.distributions.FloatDistribution(0.0, 1.0), "depth": optuna.distributions.IntDistribution(1, 3)}

    def told(runs: int) -> dict[str, float]:
        study = optuna.create_study(direction="maximize")
        for i in range(runs):
            params = {"rate": (i * 7 % runs) / runs, "depth": 1 + i % 3}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, value=params["rate"]))
        return importances(study, list(kinds))

    assert told(19) == {}
    assert next(iter(told(24))) == "rate"


def test_a_slice_has_the_axis_of_its_parameter() -> None:
    kinds: dict[str, optuna.distributions.BaseDistribution] = {
        "a.rate": optuna.distributions.FloatDistribution(0.001, 0.1, log=True),
        "a.size": optuna.distributions.CategoricalDistribution([3, 5]),
        "a.word": optuna.distributions.CategoricalDistribution(["x", "y"]),
    }
    rows = [{"a.rate": 0.01 * (i + 1), "a.size": 3 + 2 * (i % 2), "a.word": "xy"[i % 2]} for i in range(4)]
    made = [optuna.trial.create_trial(params=params, distributions=kinds, value=i) for i, params in enumerate(rows)]
    found = {name: slice_of(made, name, "score") for name in kinds}
    assert {name: figure.layout.xaxis.type for name, figure in found.items()} == {"a.rate": "log", "a.size": None, "a.word": "category"}
    assert list(found["a.word"].data[0].x) == ["x", "y", "x", "y"]
    assert list(found["a.size"].data[0].x) == [3, 5, 3, 5]
