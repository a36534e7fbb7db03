"""The space that a search chooses from, and the rungs that end a run early."""

import dataclasses
import random
from pathlib import Path

import optuna
import pytest

from jobs.task import task_of
from sweeps.execution.scheduler import judge, next_claim
from sweeps.search import search
from sweeps.spec.check import check_dimension
from sweeps.spec.labels import label
from sweeps.spec.rungs import goes_on, rung_epochs
from sweeps.spec.space import Dimension, all_configurations, baseline, choice, grid_configurations, real, whole
from sweeps.spec.sweep import FIRST_SEED, build_trials, grid_of
from sweeps.state.view import View
from tests.support.searched import OBJECTIVE, State, end, searched
from tests.support.tiny_search import SWEEP
from tests.support.tiny_sweep import sweep

# The space.


def test_a_dimension_that_cannot_matter_is_not_chosen() -> None:
    space = [choice("method.predictor.conv", "depthwise", "pointwise"), choice("k", 3, 5, when=("method.predictor.conv", ("depthwise",)))]
    assert grid_configurations(space, {"method": {"predictor": {"conv": "depthwise"}}}) == [
        {"method.predictor.conv": "depthwise", "k": 3},
        {"method.predictor.conv": "depthwise", "k": 5},
        {"method.predictor.conv": "pointwise"},
    ]


def test_a_grid_needs_values_and_whole_numbers_have_them() -> None:
    assert [p["a.b"] for p in grid_configurations([whole("a.b", 1, 3)], {})] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"--sampler grid must have values for a\.b; got a range without any: list them"):
        grid_configurations([real("a.b", 0.1, 1)], {})


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        (real("a", 2, 1), r"dimension a must have low < high, both finite, and low > 0 with log=True; got \[2, 1\]"),
        (real("a", 0, 1, log=True), r"and low > 0 with log=True; got \[0, 1\]"),
        (real("a", 1, 2, 3), r"grid of a must lie in \[1, 2\]; got 3"),
    ],
)
def test_a_dimension_that_makes_no_sense_is_refused(dimension: Dimension, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_dimension(dimension)


def test_the_configuration_without_changes_must_lie_in_the_space() -> None:
    outside = dataclasses.replace(SWEEP, space=[real("optimizer.lr", 0.5, 1)])
    with pytest.raises(ValueError, match=r"the unchanged configuration must be in the space: optimizer.lr must lie in \[0.5, 1\]; got"):
        searched(Path("/none"), spec=outside)


def test_a_configuration_is_called_by_its_short_keys() -> None:
    assert label({"optimizer.lr": 0.0031234, "method.predictor.depth": 2}, task_of({})) == "lr 0.0031234, depth 2"


def test_the_grid_is_a_sweep_of_configurations_that_begins_with_the_papers() -> None:
    made = grid_of(SWEEP, SWEEP.smoke, "local", ["optimizer.lr=0.01"])
    assert not made.space
    assert made.labels(SWEEP.smoke)[0] == "lr 0.01, depthwise, kernel 3, depth 3"
    assert len(made.configurations) == 2 * (2 + 1) * 3  # kernels for depthwise alone


def test_borders_belong_to_a_space() -> None:
    depth, rate = whole("depth", 1, 3), real("lr", 0.01, 0.1, 0.01, 0.1, log=True)
    check_dimension(rate)
    assert all_configurations([depth], {}) == [{"depth": 1}, {"depth": 2}, {"depth": 3}]
    assert all_configurations([depth, rate], {}) is None  # cannot be counted
    assert all_configurations([whole("depth", 1, 10_000)], {}) is not None
    assert all_configurations([whole("depth", 1, 10_001)], {}) is None  # nobody would train so many
    for value in (0.01, 0.1):
        assert baseline([rate], {"lr": value}) == {"lr": value}
    with pytest.raises(ValueError, match=r"lr must lie in \[0.01, 0.1\]; got 0.11"):
        baseline([rate], {"lr": 0.11})
    with pytest.raises(ValueError, match=r"both finite, and low > 0 with log=True; got \[0.0, 0.1\]"):
        check_dimension(real("lr", 0.0, 0.1, log=True))
    with pytest.raises(ValueError, match=r"grid of lr must lie in \[0.01, 0.1\]; got 0.2"):
        check_dimension(real("lr", 0.01, 0.1, 0.01, 0.2))


def test_a_search_has_no_more_configurations_than_its_space_and_is_named_by_what_it_searches(tmp_path: Path) -> None:
    small = dataclasses.replace(SWEEP, space=[whole("method.predictor.depth", 1, 3)])
    made = searched(tmp_path, spec=small, max_trials=50).search
    assert made is not None
    assert made.max_trials == 3
    digests = {
        searched(tmp_path / str(i), spec=spec, max_trials=most).search.digest  # type: ignore[union-attr]
        for i, (spec, most) in enumerate([(small, 50), (small, 2), (SWEEP, 3)])
    }
    assert len(digests) == 2  # more configurations of one space are the same search
    first, second = made.trial(0, 0, {"method.predictor.depth": 3}, 42), made.trial(4, 2, {"method.predictor.depth": 1}, 43)
    assert (first.label, second.label) == ("baseline: depth 3", "#2 depth 1")
    assert made.trial(5, 0, {"method.predictor.depth": 3}, 43).label == first.label  # its second seed is a run of the same configuration
    assert (second.values["method"]["predictor"]["depth"], second.values["seed"]) == (1, 43)


def test_every_trial_is_probed_at_its_rungs_beside_its_own_probes() -> None:
    for trial in build_trials(sweep(), sweep().smoke, 1, "local", ["probes.at_epochs=[3]"], [1, 2]):
        assert trial.config.probes.at_epochs == [1, 2, 3]
    for key in ("seed=3", "method.predictor.depth=2", "cluster=komondor"):
        with pytest.raises(ValueError, match=f"{key.partition('=')[0]} must not be overridden, because tiny_sweep sets it; got {key}"):
            build_trials(sweep(), sweep().smoke, 1, "local", [key])


# Rungs.


def test_rungs_are_eta_apart_and_none_lies_in_the_warm_up() -> None:
    assert rung_epochs(200, 10, 2) == [25, 50, 100]
    assert rung_epochs(200, 60, 2) == [100]
    assert rung_epochs(200, 10, 4) == [50]  # an earlier one would lie in the first eighth
    assert rung_epochs(12, 5, 3) == []
    assert rung_epochs(3, 0, 4) == []
    assert rung_epochs(20, 5, 4) == []  # at the end of the warm-up it is not over yet
    assert rung_epochs(20, 4.9, 4) == [5]
    assert rung_epochs(64, 0, 2) == [8, 16, 32]  # the first eighth, and no earlier


def test_equals_go_on_together_and_a_run_is_one_of_those_it_is_held_against() -> None:
    assert goes_on(5.0, [5.0, 5.0, 5.0], 2)
    assert goes_on(2.0, [3.0, *[1.0] * 6], 4)  # second of 8: two go on
    assert not goes_on(2.0, [3.0, *[1.0] * 5], 4)  # second of 7: one does
    assert goes_on(5.0, [], 4)


def test_a_resumed_run_is_not_compared_with_what_it_had_itself_at_the_rung(tmp_path: Path) -> None:
    """It comes to the rung a second time, and its first value stands in its folder already."""
    made = searched(tmp_path, [2])
    for score in (70.0, 50.0, 40.0, 30.0):
        trial = search.begin(View(made))
        assert trial
        end(made, trial, score, e2=score)
    run = made.run(made.trials[0])
    run.prepare(made.trials[0].config)
    run.open_metrics(0)
    run.record("probe", 10, {"epoch": 2.0, OBJECTIVE: 60.0})
    run.close()
    view = View(made)
    assert view.rung_values(2, FIRST_SEED)[made.trials[0].signature] == 60.0
    assert judge(view, made.trials[0])(2, {OBJECTIVE: 60.0}) == f"{OBJECTIVE} 60.00 at epoch 2 is not among the best 1/3 of 5 runs"


def test_a_run_is_compared_with_those_of_its_own_seed(tmp_path: Path) -> None:
    made = searched(tmp_path, [2], seeds=2, max_trials=4)
    view = View(made)
    while (got := next_claim(view, "d")) is not None:
        with got[1]:
            end(made, got[0], float(got[0].number), e2=float(got[0].seed))
    for seed, n in ((FIRST_SEED, 4), (FIRST_SEED + 1, 3)):  # the two leaders and the baseline
        assert list(view.rung_values(2, seed).values()) == [float(seed)] * n


def test_a_rung_lets_the_best_share_go_on_and_decides_as_optunas_does() -> None:
    """Optuna's SuccessiveHalvingPruner on the same stream of values, one run after the other."""
    random.seed(3)
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    theirs = optuna.create_study(direction="maximize", pruner=pruner)
    ours: list[float] = []
    for _ in range(60):
        value = random.random()
        asked = theirs.ask()
        asked.report(value, 1)
        stopped = asked.should_prune()
        theirs.tell(asked, None if stopped else value, State.PRUNED if stopped else State.COMPLETE)
        assert goes_on(value, ours, 3) is not stopped
        ours.append(value)


def test_a_probe_without_value_is_no_reason_to_end_a_run(tmp_path: Path) -> None:
    made = searched(tmp_path, [2])
    for score in (50.0, 60.0, 70.0):
        trial = search.begin(View(made))
        assert trial
        end(made, trial, score, e2=score)
    verdict = judge(View(made), made.trials[0])
    assert verdict(2, {}) == ""
    assert verdict(1, {OBJECTIVE: 1.0}) == ""  # no rung
    assert verdict(2, {OBJECTIVE: 65.0}) == f"{OBJECTIVE} 65.00 at epoch 2 is not among the best 1/3 of 4 runs"
    assert verdict(2, {OBJECTIVE: 71.0}) == ""


def test_a_probe_without_value_does_not_count_at_a_rung(tmp_path: Path) -> None:
    made = searched(tmp_path, [2])
    for _ in range(5):
        trial = search.begin(View(made))
        assert trial
        end(made, trial, 90.0)  # its probe at the rung had none
    assert judge(View(made), made.trials[0])(2, {OBJECTIVE: 1.0}) == ""


def test_further_seeds_of_a_configuration_are_not_judged(tmp_path: Path) -> None:
    made = searched(tmp_path, [2], seeds=2, max_trials=4)
    view, begun = View(made), []
    while (got := next_claim(view, "d")) is not None:
        with got[1]:
            end(made, got[0], float(got[0].number), e2=50.0)
        begun.append(got[0])
    assert [t.seed for t in begun] == [FIRST_SEED] * 4 + [FIRST_SEED + 1] * 3  # the two leaders and the baseline
    verdicts = [judge(view, t)(2, {OBJECTIVE: -1.0}) for t in begun]  # the last of its seed in each case
    assert [verdict.endswith(" is not among the best 1/3 of 4 runs") for verdict in verdicts[:4]] == [True] * 4
    assert verdicts[4:] == [""] * 3
