import numpy as np
import pytest
from scipy import stats

from sweeps.report.significance import ALPHA, PAIRED, RANKS, SIGN, UNTESTED, WELCH, compare

DRAWS = 3000
# Three standard errors of a share of ALPHA among so many draws.
MOST = ALPHA + 3 * (ALPHA * (1 - ALPHA) / DRAWS) ** 0.5
IMAGES = 287  # held-out digits: a score is a whole number of them


def scores(means: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Top-1 in percent of as many images, around `means`."""
    return np.round(np.clip(means, 0, 100) * IMAGES / 100) * 100 / IMAGES


def judged(a: np.ndarray, b: np.ndarray, shared: bool) -> bool:
    """Whether whichever of two configurations has the higher mean is significantly better."""
    one = dict(enumerate(a.tolist()))
    two = dict(enumerate(b.tolist(), 0 if shared else 100))
    return compare(*((one, two) if a.mean() >= b.mean() else (two, one))).significant


def share(n: tuple[int, int], std: tuple[float, float], shared: bool, apart: float = 0.0, seed_effect: float = 2.0) -> float:
    """How often two configurations with means 70 and 70 + apart are called different."""
    rng, found = np.random.default_rng(1), 0
    for _ in range(DRAWS):
        common = rng.normal(0, seed_effect, max(n))  # what a seed does to both: its split, its order
        a = scores(70 + common[: n[0]] + rng.normal(0, std[0], n[0]), rng)
        other = common if shared else rng.normal(0, seed_effect, max(n))
        b = scores(70 + apart + other[: n[1]] + rng.normal(0, std[1], n[1]), rng)
        found += judged(a, b, shared)
    return found / DRAWS


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_equal_configurations_over_shared_seeds_are_significant_in_the_nominal_share_at_most(n: int) -> None:
    assert share((n, n), (1.5, 1.5), shared=True) <= MOST


@pytest.mark.parametrize(("n", "std"), [((3, 3), (1.5, 1.5)), ((30, 30), (1.5, 1.5)), ((4, 12), (3.0, 0.5)), ((12, 4), (3.0, 1.0))])
def test_equal_configurations_over_other_seeds_are_significant_in_the_nominal_share_at_most(
    n: tuple[int, int], std: tuple[float, float]
) -> None:
    assert share(n, std, shared=False) <= MOST


def test_the_best_of_many_equal_configurations_is_significantly_better_than_its_next_in_the_nominal_share_at_most() -> None:
    rng, found = np.random.default_rng(2), 0
    for _ in range(DRAWS):
        runs = scores(70 + rng.normal(0, 2, 5) + rng.normal(0, 1.5, (11, 5)), rng)
        best, other = np.argsort(-runs.mean(1))[:2]
        found += judged(runs[best], runs[other], shared=True)
    assert found / DRAWS <= MOST


def test_a_clear_difference_is_found_with_few_seeds() -> None:
    assert share((3, 3), (0.5, 0.5), shared=True, apart=6.0) > 0.95
    assert share((5, 5), (1.0, 1.0), shared=False, apart=6.0, seed_effect=0.5) > 0.95
    assert share((30, 30), (1.5, 1.5), shared=True, apart=2.0) > 0.95


def test_pairing_finds_what_the_seeds_common_noise_hides() -> None:
    kept = share((5, 5), (0.4, 0.4), shared=True, apart=1.5, seed_effect=4.0)
    assert kept > 0.9
    assert share((5, 5), (0.4, 0.4), shared=False, apart=1.5, seed_effect=4.0) < kept / 2


def test_it_is_the_t_test_of_scipy() -> None:
    a, b = {1: 71.0, 2: 73.5, 3: 70.1, 4: 72.2}, {1: 69.9, 2: 72.8, 3: 69.5, 4: 72.0}
    paired, unpaired = stats.ttest_rel([*a.values()], [*b.values()]), stats.ttest_ind([*a.values()], [*b.values()], equal_var=False)
    found = compare(a, b)
    assert (found.test, found.n) == (PAIRED, (4, 4))
    assert found.p == pytest.approx(paired.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(paired.confidence_interval()))
    moved = compare(a, {seed + 10: score for seed, score in b.items()})
    assert (moved.test, moved.n) == (WELCH, (4, 4))
    assert moved.p == pytest.approx(unpaired.pvalue)
    assert (moved.low, moved.high) == pytest.approx(tuple(unpaired.confidence_interval()))
    assert str(moved).startswith("Welch's t over 4 and 4 runs, p = ")


def test_shared_seeds_are_paired_and_the_others_left_out_of_the_test() -> None:
    found = compare({1: 70.0, 2: 71.0, 3: 60.0}, {1: 69.0, 2: 70.5})
    assert (found.test, found.n, found.difference) == (PAIRED, (2, 2), 0.75)


def test_one_run_of_either_cannot_be_tested() -> None:
    found = compare({1: 90.0}, {1: 10.0, 2: 10.0})
    assert (found.test, found.p, found.low, found.significant) == (UNTESTED, None, None, False)


def test_scores_without_spread_are_judged_by_sign_and_rank() -> None:
    few, many = (dict.fromkeys(range(n), 71.0) for n in (3, 6))
    assert (compare(few, dict.fromkeys(range(3), 70.0)).test, compare(few, dict.fromkeys(range(3), 70.0)).significant) == (SIGN, False)
    assert compare(many, dict.fromkeys(range(6), 70.0)).p == 2**-5
    assert compare(many, dict.fromkeys(range(6), 71.0)).p == 1.0
    apart = compare(dict.fromkeys(range(4), 71.0), dict.fromkeys(range(10, 14), 70.0))
    assert (apart.test, apart.p) == (RANKS, pytest.approx(2 / 70))


def test_what_is_significant_is_read_off_a_table_of_students_t() -> None:
    """Differences 1, 2, 3 over shared seeds: mean 2, standard error 1/sqrt(3), t = 3.464; the 97.5 % point of 2 degrees is 4.303."""
    paired = compare({1: 11.0, 2: 22.0, 3: 33.0}, {1: 10.0, 2: 20.0, 3: 30.0})
    assert (paired.test, paired.n, paired.difference) == (PAIRED, (3, 3), pytest.approx(2.0))
    assert (paired.low, paired.high) == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-4)
    assert paired.p == pytest.approx(0.0742, abs=5e-5)
    assert not paired.significant
    # Welch with equal n and variances is the pooled test: 3 + 3 - 2 degrees, whose point is 2.776.
    apart = compare({1: 1.0, 2: 2.0, 3: 3.0}, {4: 5.0, 5: 6.0, 6: 7.0})
    assert (apart.test, apart.n, apart.difference) == (WELCH, (3, 3), -4.0)
    half = 2.77645 * (2 / 3) ** 0.5
    assert (apart.low, apart.high) == pytest.approx((-4 - half, -4 + half), abs=1e-4)
    # Two runs against five: variances 2 and 2.5, degrees (1 + 0.5)^2 / (1 / 1 + 0.25 / 4) = 2.118.
    uneven = compare({1: 1.0, 2: 3.0}, {4: 5.0, 5: 6.0, 6: 7.0, 7: 8.0, 8: 9.0})
    assert uneven.p == pytest.approx(2 * stats.t.cdf(-5 / 1.5**0.5, 2.25 / 1.0625), rel=1e-9)
