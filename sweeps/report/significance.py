"""Compare two configurations, as if there were no others; sweeps/report/winner.py judges among all.

One t-test is declared: two-sided, at 5 %, paired for shared seeds, Welch's otherwise. It is
two-sided because the runs themselves choose which of the two is called best. Runs of one seed share
images, their order, masks and, if the networks are alike, initial weights; pairing removes that
common noise. Without variance, a sign or rank test takes its place.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALPHA = 0.05
PAIRED, WELCH, SIGN, RANKS, UNTESTED = "paired t", "Welch's t", "sign test", "rank test", "no test"


@dataclass(frozen=True)
class Comparison:
    """Comparison of the best with the next. Without two runs of each there is no test."""

    test: str
    n: tuple[int, int]  # runs of each, or the number of pairs for a paired test
    difference: float  # between the means of the tested runs
    low: float | None = None  # bounds of its 95 % interval, of a t-test only
    high: float | None = None
    p: float | None = None  # chance of a difference as large; None without a test

    @property
    def significant(self) -> bool:
        """Return whether the difference is significant at 5 %."""
        return self.p is not None and self.p < ALPHA

    def __str__(self) -> str:
        """Return 'paired t over 3 seeds, p = 0.012'."""
        if self.test == UNTESTED:
            return "fewer than two runs of each, no test"
        assert self.p is not None
        return f"{self.how}, p {'< 0.001' if self.p < 0.001 else f'= {self.p:.2g}'}"

    @property
    def how(self) -> str:
        """Return 'paired t over 3 seeds'."""
        over = f"{self.n[0]} seeds" if self.test in (PAIRED, SIGN) else f"{self.n[0]} and {self.n[1]} runs"
        return f"{self.test} over {over}"


def compare(best: Mapping[int, float], other: Mapping[int, float]) -> Comparison:
    """Compare seed -> score of two configurations, over shared seeds if there are two or more."""
    shared = sorted(best.keys() & other.keys())
    if len(shared) > 1:
        return _paired([best[seed] - other[seed] for seed in shared])
    if min(len(best), len(other)) > 1:
        return _welch(list(best.values()), list(other.values()))
    return Comparison(UNTESTED, (len(best), len(other)), statistics.fmean(best.values()) - statistics.fmean(other.values()))


def _paired(differences: Sequence[float]) -> Comparison:
    n, mean, std = len(differences), statistics.fmean(differences), statistics.stdev(differences)
    if std > 1e-9 * max(abs(mean), 1.0):
        return _t_test(PAIRED, (n, n), mean, std / math.sqrt(n), n - 1)
    # Scores count whole images. An equal difference on each seed has no variance, but a sign.
    p = 2.0 ** (1 - n) if abs(mean) > 1e-9 else 1.0
    return Comparison(SIGN, (n, n), mean, p=p)


def _welch(a: Sequence[float], b: Sequence[float]) -> Comparison:
    n, mean = (len(a), len(b)), statistics.fmean(a) - statistics.fmean(b)
    parts = statistics.variance(a) / n[0], statistics.variance(b) / n[1]
    if sum(parts) <= 1e-18:  # all runs of each are equal: no variance, but a rank
        return Comparison(RANKS, n, mean, p=2 / math.comb(sum(n), n[0]) if abs(mean) > 1e-9 else 1.0)
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (n[0] - 1) + parts[1] ** 2 / (n[1] - 1))
    return _t_test(WELCH, n, mean, math.sqrt(sum(parts)), freedom)


def _t_test(test: str, n: tuple[int, int], mean: float, error: float, freedom: float) -> Comparison:
    """Test with Student's t. Importing scipy.stats for it would take 1 s and 60 MB."""
    from scipy.special import stdtr, stdtrit

    half = float(stdtrit(freedom, 1 - ALPHA / 2)) * error
    return Comparison(test, n, mean, mean - half, mean + half, 2 * float(stdtr(freedom, -abs(mean) / error)))
