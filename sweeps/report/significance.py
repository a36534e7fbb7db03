"""Is the best setting apart from the next? One declared t-test: two-sided, at 5 %, paired where seeds are shared, Welch's otherwise.

Two-sided because the runs have chosen which of the two is called the best. Runs of one seed see the same images in the same order with the
same masks and, where the networks are alike, start from the same weights: a part of their noise is common, and pairing takes it out.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALPHA = 0.05
PAIRED, WELCH, SIGN, RANKS, UNTESTED = "paired t", "Welch's t", "sign test", "rank test", "no test"


@dataclass(frozen=True)
class Comparison:
    """The best against the next: the difference of their means over what was tested, its 95 % interval, and the chance of one as large.

    `low`, `high` and `p` are None where there is nothing to test by: fewer than two runs of either.
    """

    test: str
    n: tuple[int, int]  # runs of each; the pairs where it is paired
    difference: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def separable(self) -> bool:
        """Whether the difference is larger than chance gives to two equal settings in all but 5 % of cases."""
        return self.p is not None and self.p < ALPHA

    def __str__(self) -> str:
        """'paired t over 3 seeds, p = 0.012'."""
        if self.test == UNTESTED:
            return "fewer than two runs of each, no test"
        over = f"{self.n[0]} seeds" if self.test in (PAIRED, SIGN) else f"{self.n[0]} and {self.n[1]} runs"
        assert self.p is not None
        return f"{self.test} over {over}, p {'< 0.001' if self.p < 0.001 else f'= {self.p:.2g}'}"


def compare(best: Mapping[int, float], other: Mapping[int, float]) -> Comparison:
    """The test of two settings, each a mapping from seed to score: over shared seeds where there are at least two, else of all runs."""
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
    # Scores are whole images: the same difference on each seed has no spread for a t-test to go by, but it has a sign.
    p = 2.0 ** (1 - n) if abs(mean) > 1e-9 else 1.0
    return Comparison(SIGN, (n, n), mean, p=p)


def _welch(a: Sequence[float], b: Sequence[float]) -> Comparison:
    n, mean = (len(a), len(b)), statistics.fmean(a) - statistics.fmean(b)
    parts = statistics.variance(a) / n[0], statistics.variance(b) / n[1]
    if sum(parts) <= 1e-18:  # all runs of each came to the same: they have no spread, but a rank
        return Comparison(RANKS, n, mean, p=2 / math.comb(sum(n), n[0]) if abs(mean) > 1e-9 else 1.0)
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (n[0] - 1) + parts[1] ** 2 / (n[1] - 1))
    return _t_test(WELCH, n, mean, math.sqrt(sum(parts)), freedom)


def _t_test(test: str, n: tuple[int, int], mean: float, error: float, freedom: float) -> Comparison:
    """Student's t by its own functions: scipy.stats would cost a process that only watches a sweep a second and 60 MB."""
    from scipy.special import stdtr, stdtrit

    half = float(stdtrit(freedom, 1 - ALPHA / 2)) * error
    return Comparison(test, n, mean, mean - half, mean + half, 2 * float(stdtr(freedom, -abs(mean) / error)))
