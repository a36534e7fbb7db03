"""What a search costs and may cost: hours as an objective, budgets, and the epochs that are left."""

import itertools
from pathlib import Path

import optuna
import pytest

from cnnjepa.run.folder import RunStatus
from jobs.cost import Estimate
from sweeps.cli.estimate import check_budget
from sweeps.execution.scheduler import next_claim
from sweeps.report import optuna_study
from sweeps.search import sampler, search
from sweeps.search.configurations import tried
from sweeps.search.search import Outlook
from sweeps.spec.sweep import FIRST_SEED
from sweeps.state.view import View
from tests.support.searched import OBJECTIVE, State, end, run_to_the_end, searched


def test_two_objectives_are_accuracy_and_hours(tmp_path: Path) -> None:
    made = searched(tmp_path, costs=True, sampler="tpe", max_trials=14)
    run_to_the_end(made, lambda _: 50.0, hours=2.0)
    reported = sampler.outcome(View(made), tried(View(made))[0])
    assert list(reported.values) == [50.0, 2.0]


def test_hours_are_a_mean_over_seeds_and_fewer_are_better(tmp_path: Path) -> None:
    """Of two configurations with the same accuracy the cheaper one alone is on Optuna's front; both directions are seen in what it says."""
    made = searched(tmp_path, costs=True, max_trials=3, seeds=2)
    hours = {(0, 0): 2.0, (0, 1): 5.0, (1, 0): 3.0, (2, 0): 1.0}
    view = View(made)
    while (got := next_claim(view, "d")) is not None:
        trial = got[0]
        with got[1]:
            score = {0: 60.0, 1: 60.0, 2: 40.0}[trial.configuration_number]
            end(made, trial, score, hours=hours.get((trial.configuration_number, trial.seed - FIRST_SEED), 3.0))
    assert [list(sampler.outcome(view, p).values) for p in tried(view)] == [[60.0, 3.5], [60.0, 3.0], [40.0, 1.0]]
    assert sampler.directions(True) == [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]
    assert sampler.directions(False) == [optuna.study.StudyDirection.MAXIMIZE]
    shown = optuna_study.study_of(view)
    assert shown.directions == sampler.directions(True)
    assert shown.metric_names == [OBJECTIVE, "device-hours"]
    assert {(t.user_attrs["setting"], t.user_attrs["seed"]) for t in shown.best_trials} == {
        (made.trials[0].label, "42"),  # 60 for 2 hours: nobody has more, and nobody as much for less
        (view.sweep.trials[2].label, "42"),  # 40, the cheapest
    }


def test_what_was_pruned_has_no_accuracy_beside_its_cost(tmp_path: Path) -> None:
    made = searched(tmp_path, [2], costs=True)
    end(made, made.trials[0], None, RunStatus.pruned, hours=1.0, e2=30.0)
    assert sampler.outcome(View(made), tried(View(made))[0]).state is State.FAIL


def test_two_objectives_are_asked_of_the_sampler_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = searched(tmp_path, costs=True, sampler="tpe")
    past = [sampler.Outcome(made.trials[0].params, State.COMPLETE, [60.0, 2.0]), sampler.Outcome(made.trials[0].params, State.FAIL)]
    asked: list[optuna.Study] = []
    create = optuna.create_study

    def noted(**options: object) -> optuna.Study:
        asked.append(create(**options))  # type: ignore[arg-type]
        return asked[-1]

    monkeypatch.setattr(optuna, "create_study", noted)
    assert made.search is not None
    sampler.suggest(past, made.search, 1, 0)
    assert asked[0].directions == sampler.directions(True)
    assert [t.values for t in asked[0].trials] == [[60.0, 2.0], None]  # what failed is left out; the last is what was asked for


def test_the_budget_is_never_exceeded_and_is_used(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=50, budget_hours=10.0)
    begun = run_to_the_end(made, lambda _: 50.0, hours=1.5)
    assert len(begun) == 6  # 9 hours; a seventh would take it to 10.5


def test_a_budget_holds_for_workers_that_run_side_by_side(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=50, budget_hours=10.0)
    view = View(made)
    assert next_claim(view, "d") is not None
    assert next_claim(view, "d") is None  # until the first has shown what a run costs
    end(made, made.trials[0], 50.0, hours=3.0)
    owned = [next_claim(view, "d") for _ in range(4)]
    assert [o is not None for o in owned] == [True, True, False, False]


def test_a_budget_counts_what_failed_and_ends_a_search_whose_every_run_fails(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=50, budget_hours=10.0)
    view, begun = View(made), 0
    while (got := next_claim(view, "d")) is not None:
        with got[1]:
            end(made, got[0], None, RunStatus.failed, hours=5.0)
        begun += 1
    assert begun == 2


def test_a_budget_goes_by_the_most_expensive_epoch(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=50, budget_hours=20.0)
    costs = itertools.chain([1.0, 1.0, 4.0], itertools.repeat(1.0))
    view, spent = View(made), 0.0
    while (got := next_claim(view, "d")) is not None:
        cost = next(costs)
        with got[1]:
            end(made, got[0], 50.0, hours=cost)
        spent += cost
    # After 1 + 1 + 4 hours a run is taken to cost 4: ten more of 1 begin, the last of them at 15, and at 16 one still does.
    assert spent == 17.0


def test_an_expected_cost_lets_workers_begin_side_by_side_and_holds_the_first_run_too(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=50, budget_hours=10.0).expecting(3.0 / 4)  # 4 epochs a run
    view = View(made)
    assert [next_claim(view, "d") is not None for _ in range(5)] == [True, True, True, False, False]
    price = Estimate(1, 4, 3.0, "", "GPU-hours", None, 1, 1, True)
    with pytest.raises(ValueError, match=r"--budget-gpu-hours must be at least the 12\.0 GPU-hours of one run; got 10"):
        check_budget(made, price)


def test_runs_left_is_an_upper_bound_that_is_met_when_nothing_is_stopped(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=12, seeds=3)
    assert Outlook(View(made)).runs_left_at_most == 11 * 3 + 2  # the baseline is there
    begun = run_to_the_end(made, lambda t: -float(t.configuration_number))
    assert len(begun) == 12 + 2 * 2
    # Every configuration has completed, and each could still be asked for its further seeds if it were to lead.
    assert Outlook(View(made)).runs_left_at_most == 10 * 2


def test_a_search_that_is_asked_for_one_seed_has_nothing_left_when_all_configurations_have_ended(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=3)
    run_to_the_end(made, lambda t: float(t.configuration_number))
    outlook = Outlook(View(made))
    assert (outlook.runs_left_at_most, outlook.untried, outlook.seeds_due, outlook.to_begin) == (0, 0, [], 0)


def test_epochs_are_expected_by_the_share_that_goes_on_at_each_rung(tmp_path: Path) -> None:
    """Of 4 epochs: all to the first rung at 1, a third from there to the second at 2, a ninth from there to the end."""
    outlook = Outlook(View(searched(tmp_path, [1, 2], max_trials=5, seeds=3)))
    assert search.epochs_expected(outlook) == pytest.approx(4 * (1 + 1 / 3 + 2 / 9) + 3 * 2 * 4)
    whole_runs = Outlook(View(searched(tmp_path / "whole", max_trials=5, seeds=1, eta=0)))
    assert search.epochs_expected(whole_runs) == 4 * 4


def test_the_epochs_of_an_ended_run_are_all_or_those_to_its_last_probe(tmp_path: Path) -> None:
    trial = searched(tmp_path).trials[0]
    on_the_way: dict[str, dict[str, float]] = {"2": {}, "10": {}, "9": {}}
    assert search.epochs_done(trial, "completed", on_the_way) == 4.0
    assert search.epochs_done(trial, "pruned", on_the_way) == 10.0  # numbers, not words
    assert search.epochs_done(trial, "pruned", {}) == 0.0
    assert search.epochs_done(trial, "failed", on_the_way) == 0.0


def test_a_pruned_run_tells_what_an_epoch_costs(tmp_path: Path) -> None:
    made = searched(tmp_path, [2], max_trials=50, budget_hours=10.0)
    end(made, made.trials[0], None, RunStatus.pruned, hours=1.0, e1=30.0, e2=30.0)
    outlook = Outlook(View(made))
    assert outlook.hours == (1.0, 0.5)
    assert (outlook.left, outlook.cheapest) == (9.0, 2.0)
