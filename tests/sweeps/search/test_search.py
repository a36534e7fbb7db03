"""Searches without training: what is chosen next, what a rung decides, and what a sampler sees."""

import dataclasses
import itertools
from pathlib import Path

import optuna
import pytest

from cnnjepa.run.folder import RunStatus
from sweeps.cli.cancel import cancel
from sweeps.execution import rounds
from sweeps.execution.changes import left_to_run, take_up
from sweeps.execution.scheduler import next_claim
from sweeps.report.aggregate import shown_configurations
from sweeps.report.status import best_line, rungs_line, sweep_status
from sweeps.report.tables import peoples_table, summary_csv
from sweeps.search import sampler, search
from sweeps.search.configurations import tried
from sweeps.spec.space import whole
from sweeps.spec.sweep import FIRST_SEED, Search, Trial
from sweeps.state import claims
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View
from tests.support.searched import OBJECTIVE, State, end, run_to_the_end, searched
from tests.support.tiny_search import SWEEP
from tests.sweeps.execution.test_worker import never, shown

# What is chosen next.


def test_a_trial_that_another_command_has_chosen_and_not_yet_begun_is_progress(tmp_path: Path) -> None:
    """A worker that lost the choice to it returns in between with nothing."""
    made = searched(tmp_path)
    end(made, made.trials[0], 50.0)

    def overtaken(workers: int, silent: frozenset[Path]) -> list[str]:
        assert search.begin(View(Sweep.load(made.path))) is not None
        return []

    assert rounds.run_round(View(made), overtaken, 1, shown, never)
    with pytest.raises(RuntimeError, match="workers end before they claim a trial"):  # it waits now, and nobody takes it
        rounds.run_round(View(made), lambda *_: [], 1, shown, never)


def test_trial_0_is_the_configuration_without_changes_and_all_others_are_new(tmp_path: Path) -> None:
    begun = run_to_the_end(searched(tmp_path), lambda _: 50.0)
    assert begun[0].label == "baseline: lr 0.01, depthwise, kernel 3, depth 3"
    assert begun[0].configuration_number == 0
    assert [t.number for t in begun] == list(range(12))
    assert len({t.signature for t in begun}) == 12
    assert all(("method.predictor.kernel" in t.params) is (t.params["method.predictor.conv"] == "depthwise") for t in begun)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["multi_fidelity", "tpe", "random", "gp"])
def test_the_same_search_chooses_the_same_also_when_each_choice_is_a_new_process_s(tmp_path: Path, sampler: str) -> None:
    def score(trial: Trial) -> float:
        lr = trial.params["optimizer.lr"]
        assert isinstance(lr, float)
        return 50 - 1000 * abs(lr - 0.004)

    one, two = (searched(tmp_path / name, sampler=sampler, max_trials=14) for name in "ab")
    begun = run_to_the_end(one, score)
    again = []
    while (got := next_claim(View(Sweep.load(two.path)), Process.me().driver)) is not None:
        with got[1]:
            end(two, got[0], score(got[0]))
        again.append(got[0])
    assert [t.params for t in begun] == [t.params for t in again]
    assert Sweep.load(two.path).trials == Sweep.load(one.path).trials


@pytest.mark.parametrize(("sampler", "most"), [("multi_fidelity", 0.5), ("tpe", 0.6)])  # the former keeps its distance from what was tried
def test_a_model_based_sampler_looks_where_the_scores_are(tmp_path: Path, sampler: str, most: float) -> None:
    """The optimum lies at lr 0.004; of the configurations after the random ones most must lie within a factor of 3 of it."""

    def score(trial: Trial) -> float:
        lr = trial.params["optimizer.lr"]
        assert isinstance(lr, float)
        return 50 - 20 * abs(lr / 0.004 - 1) if lr > 0.004 else 50 - 20 * abs(0.004 / lr - 1)

    begun = run_to_the_end(searched(tmp_path, sampler=sampler, max_trials=40), score)
    near = [0.004 / 3 < float(t.params["optimizer.lr"]) < 0.012 for t in begun]
    late, early = near[20:], near[1:11]
    assert sum(late) / len(late) > most
    assert sum(late) / len(late) > sum(early) / len(early)


def test_two_workers_that_choose_at_once_take_two_numbers(tmp_path: Path) -> None:
    made = searched(tmp_path)
    first, second = View(made), View(Sweep.load(made.path))
    stale = search.choose(second)
    chosen = search.begin(first)
    assert stale is not None
    assert chosen is not None
    assert not second.sweep.register(stale)  # its number is taken
    other = search.begin(second)
    assert other is not None
    assert (chosen.number, other.number) == (1, 2)
    assert chosen.signature != other.signature


def test_a_choice_whose_worker_died_before_it_began_is_begun_by_another(tmp_path: Path) -> None:
    made = searched(tmp_path)
    got = next_claim(View(made), "d")
    assert got is not None
    left = search.begin(View(made))
    assert left is not None
    again = next_claim(View(Sweep.load(made.path)), "e")
    assert again is not None
    assert again[0] == left


def test_choices_of_another_space_are_none_of_this_search(tmp_path: Path) -> None:
    run_to_the_end(searched(tmp_path, max_trials=5), lambda _: 50.0)
    narrower = dataclasses.replace(SWEEP, space=[*SWEEP.space[:-1], whole("method.predictor.depth", 2, 3)])
    other = searched(tmp_path, spec=narrower, max_trials=5)
    assert len(other.trials) == 1
    assert [t.number for t in run_to_the_end(other, lambda _: 50.0)] == [5, 6, 7, 8]  # the baseline has its result


@pytest.mark.parametrize("sampler", ["multi_fidelity", "random"])
def test_a_space_that_is_exhausted_ends_the_search(tmp_path: Path, sampler: str) -> None:
    small = dataclasses.replace(SWEEP, space=[whole("method.predictor.depth", 1, 3)])
    made = searched(tmp_path, spec=small, sampler=sampler, max_trials=50, seeds=2)
    begun = run_to_the_end(made, lambda t: float(t.configuration_number))
    assert {t.params["method.predictor.depth"] for t in begun} == {1, 2, 3}
    assert len(begun) == 6  # a second seed for the best two and the baseline
    assert search.is_over(View(made))


def test_seeds_go_to_configurations_that_are_still_in_the_running(tmp_path: Path) -> None:
    """When 12 configurations have been tried with one seed each, the best two and the baseline get all three, and no other gets one."""
    made = searched(tmp_path, max_trials=12, seeds=3)

    def score(number: int) -> float:
        return float(number * 37 % 101)

    begun = run_to_the_end(made, lambda t: score(t.configuration_number))
    numbers = {t.configuration_number for t in begun}
    seeds = {number: [t.seed for t in begun if t.configuration_number == number] for number in numbers}
    assert all(found == list(range(FIRST_SEED, FIRST_SEED + len(found))) for found in seeds.values())
    counts = {number: sum(t.configuration_number == number for t in begun) for number in numbers}
    best = sorted(numbers, key=score)[-2:]
    assert [counts[p] for p in [*best, 0]] == [3, 3, 3]
    assert sum(counts.values()) == 12 + 3 * 2
    assert [t.seed for t in begun[:12]] == [FIRST_SEED] * 12
    assert all(t.params == next(o.params for o in begun if o.configuration_number == t.configuration_number) for t in begun)


def test_the_leaders_get_their_seeds_side_by_side(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=4, seeds=2)
    run_to_the_end(dataclasses.replace(made, search=dataclasses.replace(made.search, seeds=1)), lambda t: float(t.configuration_number))
    view = View(made)
    first, second, third = next_claim(view, "d"), next_claim(view, "d"), next_claim(view, "d")
    assert first is not None
    assert second is not None
    assert third is not None
    assert {first[0].seed, second[0].seed, third[0].seed} == {FIRST_SEED + 1}
    assert [found[0].configuration_number for found in (first, second, third)] == [3, 2, 0]
    assert next_claim(view, "d") is None


def test_the_best_at_the_end_has_all_its_seeds_also_where_first_seeds_were_lucky(tmp_path: Path) -> None:
    """The first seed of every other configuration is 20 too high; the winner must lead by all its seeds, not by that one."""
    made = searched(tmp_path, max_trials=9, seeds=3)
    begun = run_to_the_end(
        made, lambda t: float(t.configuration_number) + (20.0 if t.seed == FIRST_SEED and t.configuration_number % 2 else 0.0)
    )
    view = View(made)
    ranked = sorted(tried(view), key=lambda p: -p.mean)
    assert [len(p.scores) for p in ranked[: search.FINALISTS]] == [3, 3]
    # 7, 5, 3 and 1 lead one after the other by their lucky seeds; after a second seed each, 7 (17), 5 (15) and 3 (13) get a third, and with
    # 13.7 and 11.7 the first two of them stay before the 11 of 1.
    assert [p.number for p in ranked[:2]] == [7, 5]
    assert {p.number: len(p.trials) for p in ranked if len(p.trials) > 1} == {7: 3, 5: 3, 3: 3, 1: 2, 0: 3}
    assert len(begun) == 9 + 2 + 2 + 2 + 1 + 2  # the last two are of the baseline


def test_the_baseline_gets_as_many_seeds_as_a_finalist(tmp_path: Path) -> None:
    def seeds_of(made: Sweep) -> dict[int, int]:
        return {p.number: len(p.trials) for p in tried(View(made)) if len(p.trials) > 1}

    made = searched(tmp_path / "last", max_trials=5, seeds=3)
    run_to_the_end(made, lambda t: float(t.configuration_number))
    assert seeds_of(made) == {4: 3, 3: 3, 0: 3}
    first = searched(tmp_path / "first", max_trials=5, seeds=3)
    run_to_the_end(first, lambda t: -float(t.configuration_number))
    assert seeds_of(first) == {0: 3, 1: 3}
    # Where it was pruned, its further seeds run to the end; where it failed, there are none.
    pruned = searched(tmp_path / "pruned", [2], max_trials=4, seeds=3)
    end(pruned, pruned.trials[0], None, RunStatus.pruned, e2=1.0)
    run_to_the_end(pruned, lambda t: float(t.configuration_number))
    assert seeds_of(pruned) == {3: 3, 2: 3, 0: 3}
    failed = searched(tmp_path / "failed", max_trials=4, seeds=3)
    end(failed, failed.trials[0], None, RunStatus.failed)
    run_to_the_end(failed, lambda t: float(t.configuration_number))
    assert seeds_of(failed) == {3: 3, 2: 3}


def test_the_leaders_come_before_the_baseline_where_there_is_a_budget(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=4, seeds=2, budget_hours=6.5)  # 4 configurations, and 2 runs more
    run_to_the_end(made, lambda t: float(t.configuration_number), hours=1.0)
    assert {p.number for p in tried(View(made)) if len(p.trials) > 1} == {3, 2}
    richer = searched(tmp_path / "richer", max_trials=4, seeds=2, budget_hours=7.5)
    run_to_the_end(richer, lambda t: float(t.configuration_number), hours=1.0)
    assert {p.number for p in tried(View(richer)) if len(p.trials) > 1} == {3, 2, 0}


def test_a_failed_run_is_reported_to_nobody_as_a_number(tmp_path: Path) -> None:
    made = searched(tmp_path, seeds=2)
    view = View(made)
    states = itertools.cycle([(None, RunStatus.failed), (60.0, RunStatus.completed), (None, RunStatus.completed)])
    for _ in range(6):
        got = next_claim(view, Process.me().driver)
        assert got is not None
        end(made, got[0], *next(states))
    reported = [sampler.outcome(view, p) for p in tried(view)]
    assert {t.state for t in reported} == {State.FAIL, State.COMPLETE}
    assert all(not t.values for t in reported if t.state is State.FAIL)
    assert all(list(t.values) == [60.0] for t in reported if t.state is State.COMPLETE)


def test_a_pruned_configuration_is_reported_with_how_far_it_came(tmp_path: Path) -> None:
    made = searched(tmp_path, [1, 2])
    end(made, made.trials[0], None, RunStatus.pruned, e1=30.0, e2=35.0)
    reported = sampler.outcome(View(made), tried(View(made))[0])
    assert (reported.state, dict(reported.reports)) == (State.PRUNED, {1: 30.0, 2: 35.0})


def test_samplers_are_made_as_the_documentation_says(tmp_path: Path) -> None:
    """10 configurations at random before a model is asked; running ones count as bad; dimensions that depend on others are grouped."""
    made = searched(tmp_path, sampler="tpe").search
    assert made is not None
    tpe = sampler.sampler_of(made, 3, 0)
    assert isinstance(tpe, optuna.samplers.TPESampler)
    assert (tpe._n_startup_trials, tpe._multivariate, tpe._group, tpe._constant_liar) == (10, True, True, True)
    flat = sampler.sampler_of(dataclasses.replace(made, space=[SWEEP.space[0]]), 3, 0)
    assert isinstance(flat, optuna.samplers.TPESampler)
    assert not flat._group
    gp = sampler.sampler_of(dataclasses.replace(made, sampler="gp"), 3, 0)
    assert isinstance(gp, optuna.samplers.GPSampler)
    assert gp._n_startup_trials == 10
    assert isinstance(sampler.sampler_of(made, 3, 1), optuna.samplers.RandomSampler)  # a second draw for the same number


def test_each_number_and_each_draw_is_another_choice(tmp_path: Path) -> None:
    made = searched(tmp_path).search
    assert made is not None
    rates = [sampler.suggest([], made, number, draw)["optimizer.lr"] for number in range(20) for draw in range(20)]
    assert len(set(rates)) == 400
    assert rates[0] == sampler.suggest([], made, 0, 0)["optimizer.lr"]
    # Drawn evenly in the logarithm over [0.0005, 0.05]: half lie below its middle, 0.005. Evenly in the number 9 % would.
    assert 0.4 < sum(float(rate) < 0.005 for rate in rates) / 400 < 0.6
    assert sampler.distribution(SWEEP.space[0]) == optuna.distributions.FloatDistribution(0.0005, 0.05, log=True)


# Changed while it runs.


def test_a_cancelled_search_chooses_nothing_until_it_is_taken_up(tmp_path: Path) -> None:
    made = searched(tmp_path)
    running = next_claim(View(made), Process.me().driver)
    assert running is not None
    assert "1 trials cancelled" in cancel(View(made), [])
    view = View(made)
    assert next_claim(view, "d") is None
    assert search.is_over(view)
    assert search.to_take_up(view) > 0
    with running[1]:
        pass
    take_up(View(made), retry_failed=False)
    again = next_claim(View(made), "d")
    assert again is not None
    assert again[0] == running[0]
    assert search.trials_to_begin(View(made)) > 0


def test_workers_that_run_take_up_more_trials_and_leave_another_space_alone(tmp_path: Path) -> None:
    view = View(searched(tmp_path, max_trials=3))
    assert view.follow()
    assert len(run_to_the_end(view.sweep, lambda _: 50.0)) == 3
    searched(tmp_path, max_trials=5)
    assert view.follow()
    assert len(run_to_the_end(view.sweep, lambda _: 50.0)) == 2
    narrower = dataclasses.replace(SWEEP, space=SWEEP.space[:-1])
    searched(tmp_path, max_trials=5, spec=narrower)
    assert not view.follow()


def test_what_was_set_aside_is_run_again_by_workers_that_knew_its_result(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=1)
    view = View(made)
    assert view.follow()
    got = next_claim(view, "d")
    assert got is not None
    with got[1]:
        end(made, got[0], None, RunStatus.failed)
    assert view.state(got[0]) is TrialState.failed
    take_up(View(made), retry_failed=True)
    assert view.follow()
    again = next_claim(view, "d")
    assert again is not None
    assert again[0] == got[0]


# What is taken up, and what is shown.


def test_pruned_runs_are_taken_up_where_nothing_is_stopped_any_more(tmp_path: Path) -> None:
    made = searched(tmp_path, [2])
    end(made, made.trials[0], None, RunStatus.pruned, e2=10.0)
    assert left_to_run(View(made), retry_failed=False) == []
    freed = dataclasses.replace(made, rungs=[], eta=0)
    assert left_to_run(View(freed), retry_failed=False) == [made.trials[0]]
    take_up(View(freed), retry_failed=False)
    assert View(freed).state(made.trials[0]) is TrialState.waiting
    assert (made.trial_dir(made.trials[0]) / "result.pruned-1.json").exists()


def test_pruned_configurations_are_counted_and_left_out_of_the_table_for_people(tmp_path: Path) -> None:
    made = searched(tmp_path, [2], max_trials=3)
    view = View(made)
    for number, (score, status) in enumerate([(60.0, RunStatus.completed), (None, RunStatus.pruned), (None, RunStatus.pruned)]):
        got = next_claim(view, "d")
        assert got is not None
        end(made, got[0], score, status, e2=60.0 - 10 * number)
    view = View(made)
    assert len(peoples_table(view).lines) == 1
    assert shown_configurations(view)[1] == "2 configurations were pruned and are not shown; see summary.csv"
    assert summary_csv(view).count("\n") == 4
    assert rungs_line(view) == "rungs: epoch 2: 3 runs; at each the best 1/3 continue"
    assert sweep_status(view)["counts"]["pruned"] == 2
    assert best_line(view).startswith(f"best so far by {OBJECTIVE}: baseline: lr 0.01")


def test_the_best_so_far_says_whether_it_may_be_believed(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=3, seeds=2)
    noise = {42: 0.0, 43: 1.0}
    run_to_the_end(made, lambda t: 50 + 0.1 * t.configuration_number + noise[t.seed])
    assert "; tied, difference 0.1 (sign test over 2 seeds); no test, which needs two runs of the best, and runs that differ" in best_line(
        View(made)
    )


def test_a_sweep_of_a_search_survives_its_file(tmp_path: Path) -> None:
    made = searched(tmp_path, [2], seeds=2)
    run_to_the_end(made, lambda t: float(t.number))
    again = Sweep.load(made.path)
    assert again == made
    assert [t.label for t in again.trials] == [t.label for t in made.trials]
    assert isinstance(again.search, Search)


def test_of_equal_configurations_the_earlier_ones_get_further_seeds(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=4, seeds=2)
    begun = run_to_the_end(made, lambda _: 50.0)
    assert [(t.configuration_number, t.seed) for t in begun[4:]] == [(0, FIRST_SEED + 1), (1, FIRST_SEED + 1)]


def test_a_cancelled_trial_is_not_begun_and_holds_its_place(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=3)
    claims.cancel(made.trial_dir(made.trials[0]))
    begun = run_to_the_end(made, lambda _: 50.0)
    assert [t.number for t in begun] == [1, 2]
