"""What the page's script and its search section are given: configurations, logs, budgets, and other choices."""

from pathlib import Path

import numpy as np
import pytest

from cnnjepa.run.folder import RunResult, RunStatus
from sweeps.report import html_text, html_trials
from sweeps.report.html_curves import Curve
from sweeps.report.search_budget import Spent, best_at, budget_figure, other_choices, rank_correlation, spent
from sweeps.report.seen import Seen
from sweeps.state.view import View
from tests.support.reported import CLEAR, failed, made
from tests.support.searched import OBJECTIVE, run_to_the_end, searched


def test_what_all_trials_have_in_common_is_given_once(tmp_path: Path) -> None:
    view = made(tmp_path, CLEAR)
    common, own = html_trials.configurations(view.sweep.trials)
    assert own[0] == {"method.predictor.conv": "depthwise", "method.predictor.depth": 1, "seed": 42}
    assert not common.keys() & own[0].keys()
    assert {**common, **own[4]} == dict(sorted(html_trials.leaves(view.sweep.trials[4].values).items()))
    assert [values["method.predictor.depth"] for values in own[:3]] == [1, 2, 3]


def test_logs_are_embedded_within_a_bound_those_of_failed_runs_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = made(tmp_path, CLEAR)
    for trial in view.sweep.trials:
        (view.sweep.run(trial).logs / "train.log").write_text("x" * 5000 + f"\nlast of {trial.label}\n")
    (view.sweep.trial_dir(view.sweep.trials[8]) / "result.json").unlink()
    failed(view, 8, "why", "y" * 5000 + "\nthe cause\n")
    view = View(view.sweep)
    whole = html_text.logs_of(view)
    assert len(whole) == 9
    assert whole[view.sweep.trials[0].signature].endswith("last of depth 1")
    monkeypatch.setattr(html_text, "_LOGS_BYTES", 900)
    few = html_text.logs_of(view)
    assert list(few) == [view.sweep.trials[8].signature, view.sweep.trials[0].signature]
    assert sum(len(text) for text in few.values()) <= 900
    assert few[view.sweep.trials[8].signature].endswith("the cause")


def test_the_wall_clock_goes_from_the_first_start_to_the_last_end(tmp_path: Path) -> None:
    assert html_text.wall_clock(made(tmp_path / "none", CLEAR)) == ""  # no start is recorded
    assert [html_text.in_time(s) for s in (40.0, 720.0, 7800.0, 273_600.0)] == ["40 s", "12 min", "2 h 10 min", "3 d 4 h"]


def test_the_best_so_far_is_that_of_the_runs_that_a_budget_has_paid_for() -> None:
    found = Spent(np.array([1.0, 2.0, 1.0]), np.array([50.0, np.nan, 70.0]), "hours")
    budgets = np.array([0.5, 1.0, 3.9, 4.0])
    np.testing.assert_equal(best_at(found, budgets, np.arange(3), 1.0), [np.nan, 50.0, 50.0, 70.0])
    np.testing.assert_equal(best_at(found, budgets, np.array([2, 0, 1]), 1.0), [np.nan, 70.0, 70.0, 70.0])
    np.testing.assert_equal(best_at(found, budgets, np.arange(3), -1.0), [np.nan, 50.0, 50.0, 50.0])


def search(path: Path) -> View:
    """Twelve runs, each better than the one before; RankMe is right about all, and the loss wrong."""
    made = searched(path, max_trials=12)
    run_to_the_end(made, lambda trial: 40.0 + trial.number, hours=0.5)
    for trial in made.trials:
        run = made.run(trial)
        (run.path / "result.json").unlink()
        metrics = {OBJECTIVE: 40.0 + trial.number, "collapse.rankme": 2.0 + trial.number}
        run.write_result(RunResult(RunStatus.completed, metrics=metrics, device_hours=0.5))
    return View(made)


def test_a_search_shows_its_best_against_its_budget_and_the_same_runs_in_random_orders(tmp_path: Path) -> None:
    view = search(tmp_path)
    known = spent(view, "core-hours")
    assert (known.unit, list(known.costs), list(known.scores)) == ("core-hours", [0.5] * 12, [40.0 + i for i in range(12)])
    found = budget_figure(Seen(view), "core-hours")
    assert found is not None
    low, high, middle, own = found[1].data
    assert own.y[-1] == middle.y[-1] == low.y[-1] == high.y[-1] == 51.0
    assert own.x[-1] == 6.0
    assert (np.array(low.y) <= np.array(middle.y)).all()
    assert middle.y[10] > own.y[10]  # whose first runs were the worst


def test_what_another_choice_would_have_cost_is_told_in_score(tmp_path: Path) -> None:
    view = search(tmp_path)
    curves = [{"loss": Curve([1.0], [1.0 + t.number])} for t in view.sweep.trials]
    rankme, loss = other_choices(Seen(view), curves)
    assert rankme.endswith("with 51.0, the best by the objective too; rank correlation 1.00 over 12 configurations")
    assert loss.startswith(
        "choosing by the final loss: baseline with 40.0, 11.0 % worse than the best mean; rank correlation -1.00 over 12"
    )
    assert other_choices(Seen(view), [{} for _ in curves]) == [rankme]
    assert rank_correlation([1.0, 2.0, 2.0], [1.0, 1.0, 1.0]) == 0.0
