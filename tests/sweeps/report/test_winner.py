import numpy as np
import pytest
from scipy import stats

from sweeps.report.winner import Winner, judge, many_to_one_tail, range_tail, winner

SWEEPS = 300


def simulated(configurations: int, ahead: float = 0.0, spread: float = 1.0, seed_effect: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of sweeps with three seeds, the first configuration `ahead`, the last with another spread; and the true ones."""
    rng = np.random.default_rng(configurations)
    truth = np.zeros((SWEEPS, configurations))
    truth[:, 0] = ahead
    errors = rng.normal(size=(SWEEPS, configurations, 3))
    errors[:, -1] *= spread
    return truth[..., None] + errors + seed_effect * rng.normal(size=(SWEEPS, 1, 3)), truth


@pytest.mark.parametrize(("configurations", "spread", "seed_effect"), [(2, 1.0, 2.0), (4, 1.0, 0.0), (4, 3.0, 0.0), (16, 1.0, 2.0)])
def test_among_equal_configurations_few_claims_are_made_and_the_best_is_not_overrated(
    configurations: int, spread: float, seed_effect: float
) -> None:
    scores, _ = simulated(configurations, spread=spread, seed_effect=seed_effect)
    found = judge(scores)
    false = found.declared | (~found.candidates).any(1) | found.better_than.any(1)
    assert false.mean() <= 0.06 + 3 * (0.06 * 0.94 / SWEEPS) ** 0.5
    assert abs(found.estimate.mean()) <= 0.3
    assert ((found.low <= 0) & (found.high >= 0)).mean() >= 0.94 - 3 * (0.06 * 0.94 / SWEEPS) ** 0.5
    if configurations == 16:
        overrated = scores.mean(2).max(1).mean()
        assert overrated > 0.9, "the mean of the best, which the estimate corrects"


@pytest.mark.parametrize(("configurations", "least"), [(4, 0.75), (16, 0.85)])
def test_a_configuration_three_deviations_ahead_is_declared(configurations: int, least: float) -> None:
    scores, truth = simulated(configurations, ahead=3.0)
    found = judge(scores)
    assert (found.declared & (found.best == 0)).mean() >= least
    assert (found.declared & (found.best != 0)).mean() <= 0.01
    assert abs((found.estimate - truth[np.arange(SWEEPS), found.best]).mean()) <= 0.3


def test_the_range_and_the_comparison_with_one_are_those_of_equal_normal_means() -> None:
    z = np.array([0.5, 1.5, 2.5, 3.5])
    assert range_tail(7, z) == pytest.approx(stats.studentized_range.sf(z * 2**0.5, 7, np.inf), abs=2e-4)
    assert many_to_one_tail(1, z) == pytest.approx(stats.norm.sf(z), abs=2e-4)
    draws = np.random.default_rng(0).normal(size=(200_000, 6))
    assert many_to_one_tail(5, np.array([2.0]))[0] == pytest.approx((draws[:, 1:].max(1) - draws[:, 0] > 2 * 2**0.5).mean(), abs=2e-3)


def test_the_estimate_of_the_best_is_the_mean_over_seeds_of_what_the_other_seeds_select() -> None:
    # Without 1: b leads by 5 to 3 and has 0. Without 2: a leads by 7 to 2.5 and has 2. Without 3: a leads by 6 to 3 and has 4.
    found = winner({"a": {1: 10.0, 2: 2.0, 3: 4.0}, "b": {1: 0.0, 2: 5.0, 3: 5.0}})
    assert found.best == "a"
    assert found.estimate == pytest.approx((0.0 + 2.0 + 4.0) / 3)
    turned = winner({"a": {1: -10.0, 2: -2.0, 3: -4.0}, "b": {1: 0.0, 2: -5.0, 3: -5.0}}, sign=-1)
    assert (turned.best, turned.estimate) == ("a", pytest.approx(-2.0))
    assert (turned.low, turned.high) == (pytest.approx(-found.high), pytest.approx(-found.low))  # type: ignore[operator]


def test_in_a_search_the_seed_that_chose_the_finalists_selects_and_is_not_read() -> None:
    scores = {"a": {1: 90.0, 2: 70.0, 3: 72.0}, "b": {1: 80.0, 2: 69.0, 3: 71.0}, "c": {1: 60.0}, "d": {1: 50.0}}
    assert winner(scores, adaptive=True).estimate == pytest.approx(71.0)
    assert winner(scores).estimate == pytest.approx((90 + 70 + 72) / 3)


def silent(found: Winner) -> bool:
    return not found.declared and not found.better_than and found.p is None and found.low is None


def test_without_two_runs_of_the_best_or_without_any_spread_nothing_is_claimed() -> None:
    assert silent(winner({"a": {1: 70.0}}))
    assert silent(winner({"a": {1: 90.0}, "b": {1: 10.0, 2: 11.0}}))
    alike = winner({"a": {1: 71.0, 2: 71.0}, "b": {1: 70.0, 2: 70.0}})
    assert silent(alike)
    assert alike.candidates == ["a", "b"]
    assert winner({"a": {1: 70.0, 2: 71.0}}).low is not None


def test_seeds_that_differ_are_compared_over_all_runs() -> None:
    found = winner({"a": {1: 70.0, 2: 71.0, 3: 70.6}, "b": {4: 60.0, 5: 61.0, 6: 60.6}})
    assert (found.best, found.declared, found.candidates, found.better_than) == ("a", True, ["a"], ["b"])
    assert found.estimate == pytest.approx(70.533, abs=1e-3)
