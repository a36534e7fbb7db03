"""Judge which configuration is best, from the scores of all: one model, one error rate for all claims of a page.

The best of many is in part the luckiest. Four things follow from it:

- Its score is estimated from seeds that did not select it: each seed in turn is left out, the best by
  the others is found, and its score with the seed left out is taken. The mean of these is the estimate.
- Spreads differ, and three runs say little about one. A configuration's spread is a common one times a
  ratio. The weights of the ratios are a prior that the configurations themselves correct.
- It is called the best if it differs from each other one at 5 %, two-sided, or if it lies outside what
  the others have in common, and the others that do too are worse at 5 %.
- A configuration is ruled out as best, or below the best as the baseline, only at the rate of all such
  comparisons together.

All arrays have axes (sweeps, configurations, seeds), so that tests/benchmarks/claims.py can judge
thousands of simulated sweeps with these very functions; it has measured the constants.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sweeps.report.significance import compare

Array = NDArray[np.float64]
Runs = NDArray[np.bool_]  # which there are

BEST, RULED_OUT, BASELINE = 0.05, 0.01, 0.01  # error rates: of the best, of all that are ruled out, of the baseline's comparison
COVERED = 0.95  # of an interval
_RATIOS = np.array([0.58, 1.0, 1.73, 3.0, 5.2])  # of a configuration's spread to the common one
_QUIET, _LOUD = 0.10, 0.08  # weights of the ratios below 1 and next above it
_MOST_WILD = 0.08  # weight of the highest two: one configuration in a sweep, at most so much
_PRIOR_WEIGHT = 5.0  # configurations that the prior of the weights counts for
_OTHER_OUTLIERS = 0.25  # further configurations expected outside what the others have in common
_VARIANCES = np.exp(np.linspace(-3.2, 2.4, 28))  # relative to a first estimate of the common one
_SEED_RATIOS = np.array([0.0, 0.5, 1.0, 2.0, 4.0])  # of the spread that a seed gives all configurations to the common one
_SEED_WEIGHTS = np.array([0.4, 0.2, 0.2, 0.1, 0.1])
_FEW_DEGREES = 5.0  # of freedom behind all spreads, below which a pair's own t-test is asked too
_INFLATION = 1.4  # of the error of an estimate whose seeds were left out one at a time, which depend on each other
_NODES = np.linspace(-8.0, 8.0, 321)
_DENSITY = np.exp(-0.5 * _NODES**2) / np.sqrt(2 * np.pi) * (_NODES[1] - _NODES[0])


@dataclass(frozen=True)
class Spreads:
    """What the scores say about spreads: weights over a grid of common variances, and over ratios to them."""

    variances: Array  # (sweeps, V)
    weights: Array  # (sweeps, V)
    ratios: Array  # (sweeps, configurations, V, ratios): weights
    of_seeds: Array  # (sweeps, V, seed ratios): weights
    known: NDArray[np.bool_]  # (sweeps,) whether any two runs of a configuration differ by more than their seeds


@dataclass(frozen=True)
class Judgement:
    """What may be said of the configurations of each sweep."""

    best: NDArray[np.int64]  # (sweeps,) that with the highest mean
    tested: NDArray[np.bool_]  # (sweeps,) whether it has a test: two runs, and another configuration
    declared: NDArray[np.bool_]  # (sweeps,) whether it may be called the best
    p: Array  # (sweeps,) of it against the strongest other
    candidates: NDArray[np.bool_]  # (sweeps, configurations) which may be the best
    against: Array  # (sweeps, configurations) two-sided p of the best against each, for all pairs together
    better_than: NDArray[np.bool_]  # (sweeps, configurations) whether the best is above it if it was named before, as the baseline is
    estimate: Array  # (sweeps,) score of the best, without its luck; NaN if unknown
    low: Array  # (sweeps,) bounds of its 95 % interval
    high: Array


def judge(scores: Array, adaptive: bool = False, level: float = BEST) -> Judgement:
    """Judge scores (sweeps, configurations, seeds), NaN where there is no run; a higher score is better.

    Each configuration must have a score. `adaptive` says that some seeds decided who got further
    ones. `level` is the error rate of the best where this is one of several looks (looks.py); the
    other rates are as much smaller.
    """
    there: Runs = ~np.isnan(scores)
    n = there.sum(2)
    mean = np.where(there, scores, 0.0).sum(2) / n
    best, every = mean.argmax(1), np.arange(len(scores))
    spreads = spreads_of(scores)
    p = _tails(scores, mean, best, spreads)
    testable = spreads.known[:, None] & (n[every, best] > 1)[:, None]
    p = np.where(testable, p, 1.0)
    p[every, best] = 0.0
    strongest = _strongest(mean, n, best, p, spreads)
    tested = testable[:, 0] & (scores.shape[1] > 1)
    declared = (strongest <= level) & tested
    z = _normal_quantile(np.clip(p, 1e-300, 0.5))
    against = np.where(testable, range_tail(scores.shape[1], z), 1.0)
    against[every, best] = 1.0
    candidates = (against > RULED_OUT * level / BEST) & ~declared[:, None]
    candidates[every, best] = True
    better = (many_to_one_tail(scores.shape[1] - 1, z) <= BASELINE * level / BEST) & testable | declared[:, None]
    better[every, best] = False
    estimate, low, high = _estimate(scores, best, spreads, adaptive)
    return Judgement(best, tested, declared, np.minimum(strongest, 1.0), candidates, against, better, estimate, low, high)


@dataclass(frozen=True)
class Winner:
    """What may be said of one metric of one sweep, by configuration."""

    best: str
    declared: bool
    p: float | None  # None without a test
    candidates: list[str]  # that may be the best, which contain it with 95 % confidence
    better_than: list[str]  # that the best is above, if one of them was named before, as the baseline is
    against: dict[str, float]  # p of the best against each, for all pairs together
    estimate: float | None  # of the best, without its luck
    low: float | None
    high: float | None


def winner(scores: Mapping[str, Mapping[int, float]], sign: float = 1.0, adaptive: bool = False, level: float = BEST) -> Winner:
    """Judge configuration -> seed -> score, of which each has one, as `judge` does; with sign -1 a lower score is better."""
    names, seeds = list(scores), sorted({seed for of_one in scores.values() for seed in of_one})
    table = np.array([[[sign * of_one.get(seed, np.nan) for seed in seeds] for of_one in scores.values()]])
    found = judge(table, adaptive, level)
    best = names[found.best[0]]

    def number(value: float) -> float | None:
        return None if np.isnan(value) else float(sign * value)

    low, high = sorted([found.low[0], found.high[0]], key=lambda bound: sign * bound)
    return Winner(
        best,
        bool(found.declared[0]),
        float(found.p[0]) if found.tested[0] else None,
        [name for name, may in zip(names, found.candidates[0], strict=True) if may],
        [name for name, above in zip(names, found.better_than[0], strict=True) if above],
        {name: float(p) for name, p in zip(names, found.against[0], strict=True) if name != best},
        number(found.estimate[0]),
        number(low),
        number(high),
    )


def pairs(first: Mapping[str, Mapping[int, float]], second: Mapping[str, Mapping[int, float]]) -> dict[str, float | None]:
    """Return the two-sided p of each configuration's difference between two sweeps, by the same names, for all together.

    They share one error rate by Holm's method. None where one of the two has fewer than two runs, or no two runs differ.
    """
    seeds = sorted({seed for found in (first, second) for of_one in found.values() for seed in of_one})
    scores = np.array([[[of_one.get(seed, np.nan) for seed in seeds] for found in (first, second) for of_one in found.values()]])
    p = pair_tails(scores)[0]
    if _residuals(scores, ~np.isnan(scores), (~np.isnan(scores)).sum(2))[1].sum() < _FEW_DEGREES:  # the common spread is uncertain
        alone = [compare(of_one, second[name]).p for name, of_one in first.items()]
        p = np.maximum(p, np.array([0.0 if of_pair is None else of_pair for of_pair in alone]))
    return {name: None if np.isnan(value) else float(value) for name, value in zip(first, holm(p), strict=True)}


def pair_tails(scores: Array) -> Array:
    """Return the two-sided p of the first half of the configurations against the second, one by one; NaN without a test."""
    there: Runs = ~np.isnan(scores)
    n, half = there.sum(2), scores.shape[1] // 2
    mean, spreads = np.where(there, scores, 0.0).sum(2) / n, spreads_of(scores)
    p = np.full((len(scores), half), np.nan)
    for i in range(half):
        tail = _tails(scores, mean, np.full(len(scores), i), spreads)[:, half + i]
        p[:, i] = np.minimum(2 * np.minimum(tail, 1 - tail), 1.0)
    p[~((np.minimum(n[:, :half], n[:, half:]) > 1) & spreads.known[:, None])] = np.nan
    return p


def holm(p: Array) -> Array:
    """Return p-values that hold together, whatever their tests have in common; NaN stays NaN."""
    order = np.argsort(p)  # those without a test come last
    left = np.maximum((~np.isnan(p)).sum() - np.arange(len(p)), 1)
    found = np.empty_like(p)
    found[order] = np.maximum.accumulate(np.minimum(p[order] * left, 1.0))
    return found


def spreads_of(scores: Array) -> Spreads:
    """Return what the scores say about the spread of each configuration, less what a seed does to all of them."""
    there: Runs = ~np.isnan(scores)
    n = there.sum(2)
    left, degrees, of_seeds = _residuals(scores, there, n)
    squares = (np.where(there, left, 0.0) ** 2).sum(2)  # (sweeps, configurations)
    known = squares.sum(1) > 1e-12 * np.maximum(1.0, np.nanmax(np.abs(scores), (1, 2)) ** 2)
    total = np.maximum(degrees.sum(1), 1e-9)
    centre = np.where(known, squares.sum(1) / total, 1.0)
    variances = centre[:, None] * _VARIANCES
    each = variances[:, None, :, None] * _RATIOS**2
    log = -0.5 * degrees[:, :, None, None] * np.log(each) - 0.5 * squares[:, :, None, None] / each
    most = log.max(-1, keepdims=True)
    likelihood = np.exp(log - most)
    wild = min(_MOST_WILD, 1.0 / scores.shape[1])
    prior = np.array([_QUIET, 1 - _QUIET - _LOUD - wild, _LOUD, 0.75 * wild, 0.25 * wild])
    counted = (n > 1)[:, :, None, None]
    share = np.broadcast_to(prior, (len(scores), len(prior)))
    for _ in range(8):
        joint = likelihood * share[:, None, None, :]
        evidence = joint.sum(-1, keepdims=True)
        ratios = joint / evidence
        weights = _normalized((np.log(evidence) + most)[..., 0].sum(1))
        found = np.einsum("sv,skvg->sg", weights, ratios * counted)
        share = (_PRIOR_WEIGHT * prior + found) / (_PRIOR_WEIGHT + counted.sum((1, 2, 3)))[:, None]
    # The seeds' own effects: with a spread of so many times the common one, beside the error of their estimate.
    sum_of_squares, error, freedom = of_seeds
    seen = variances[:, :, None] * (_SEED_RATIOS**2 + np.maximum(error, 1e-9)[:, None, None])
    log = -0.5 * freedom[:, None, None] * np.log(seen) - 0.5 * sum_of_squares[:, None, None] / seen + np.log(_SEED_WEIGHTS)
    # Where no two configurations share seeds, their effects are part of each one's own spread.
    log = np.where(freedom[:, None, None] > 0, log, np.where(_SEED_RATIOS == 0, 0.0, -1e9))
    return Spreads(variances, weights, ratios, _normalized(log), known)


def _residuals(scores: Array, there: Runs, n: NDArray[np.int64]) -> tuple[Array, Array, tuple[Array, Array, Array]]:
    """Return what configuration and seed leave of each score, degrees of freedom, and what is known of seeds.

    A seed has an effect of its own if two configurations with several seeds have it.
    """
    several = there & (n > 1)[:, :, None]
    met = several.sum(1)  # (sweeps, seeds) configurations
    shared = (met > 1) & ((met > 1).sum(1) > 1)[:, None]
    values, common = np.where(there, scores, 0.0), np.zeros((len(scores), scores.shape[2]))
    # With all runs there, the second round changes nothing.
    for _ in range(1 if several.all() else 25):
        own = (np.where(there, values - common[:, None, :], 0.0).sum(2) / n)[:, :, None]
        common = np.where(shared, np.where(several, values - own, 0.0).sum(1) / np.maximum(met, 1), 0.0)
        common = np.where(shared, common - (common.sum(1) / np.maximum(shared.sum(1), 1))[:, None], 0.0)
    own = (np.where(there, values - common[:, None, :], 0.0).sum(2) / n)[:, :, None]
    used = np.maximum(shared.sum(1) - 1, 0)
    within = (n - 1).sum(1)
    degrees = (n - 1) * (np.maximum(within - used, 0) / np.maximum(within, 1))[:, None]
    error = np.where(shared, 1.0 / np.maximum(met, 1), 0.0).sum(1) / np.maximum(shared.sum(1), 1)
    return values - own - common[:, None, :], degrees, ((common**2).sum(1), error, used.astype(float))


def _tails(scores: Array, mean: Array, best: NDArray[np.int64], spreads: Spreads) -> Array:
    """Return how likely a lead as large as the best's over each other configuration is by chance, one-sided.

    Over the seeds that both have, if there are two or more: what a seed does to all cancels.
    """
    every = np.arange(len(scores))
    there: Runs = ~np.isnan(scores)
    both = there & there[every, best][:, None, :]
    shared = both.sum(2)
    paired = shared > 1
    difference = np.where(both, scores[every, best][:, None, :] - scores, 0.0).sum(2) / np.maximum(shared, 1)
    difference = np.where(paired, difference, mean[every, best][:, None] - mean)
    n = there.sum(2)
    of_best = np.where(paired, shared, n[every, best][:, None])
    of_other = np.where(paired, shared, n)
    seeds = (spreads.of_seeds * _SEED_RATIOS**2).sum(2)  # (sweeps, V)
    apart = np.where(paired, 0.0, 1 / of_best + 1 / of_other)
    squared = _RATIOS**2
    leading = spreads.ratios[every, best]
    found = np.zeros(mean.shape)
    for v in range(spreads.variances.shape[1]):
        if not spreads.weights[:, v].max() > 1e-7:
            continue
        parts = squared[:, None] / of_best[:, :, None, None] + squared / of_other[:, :, None, None]
        error = np.sqrt(spreads.variances[:, v, None, None, None] * (parts + (apart * seeds[:, v, None])[:, :, None, None]))
        tails = _upper(difference[:, :, None, None] / error)
        found += spreads.weights[:, v, None] * np.einsum("skab,sa,skb->sk", tails, leading[:, v], spreads.ratios[:, :, v])
    return np.asarray(found)


def _strongest(mean: Array, n: NDArray[np.int64], best: NDArray[np.int64], p: Array, spreads: Spreads) -> Array:
    """Return the two-sided p of the best against the strongest other configuration.

    It is that of each pair, which holds whatever the others are. Or, where the best is an outlier of
    all others, each other one weighs by how far it is from what the rest have in common: the second
    of many equal ones is in front by chance, as is the first.
    """
    every, others = np.arange(len(mean)), mean.shape[1] - 1
    plain: Array = 2 * p.max(1)
    if others < 3:
        return plain
    weight = n.astype(float)
    weight[every, best] = 0.0
    total = weight.sum(1, keepdims=True)
    centre = (weight * mean).sum(1, keepdims=True) / total
    squares = (weight * (mean - centre) ** 2).sum(1, keepdims=True)
    typical = total / others  # runs of a configuration
    lead = mean[every, best][:, None]
    between = np.maximum(squares / (others - 1) - spreads.variances, 0.0) / typical  # (sweeps, V)
    error = spreads.variances[:, :, None] * _RATIOS**2 / n[every, best][:, None, None]
    error = error + (between * (1 + 1 / others) + spreads.variances / total)[:, :, None]
    tails = _upper((lead - centre)[:, :, None] / np.sqrt(error))
    outlying = (spreads.weights[:, :, None] * spreads.ratios[every, best] * tails).sum((1, 2))
    # Each other one against those that are left without it.
    without = np.maximum(total - weight, 1e-12)
    middle = (centre * total - weight * mean) / without
    spread = np.maximum(squares - weight * (mean - centre) ** 2 * total / without, 0.0) / (others - 2) / typical
    typical_variance = (spreads.weights * spreads.variances).sum(1, keepdims=True)
    scale = np.sqrt(np.maximum(spread, typical_variance / typical) * (1 + 1 / (others - 1)))
    distance = np.maximum((mean - middle) / scale, 0.0)
    expected = _OTHER_OUTLIERS / others
    outside = expected / np.maximum(lead - middle, 1e-12)
    inside = (1 - expected) * np.exp(-0.5 * distance**2) / np.sqrt(2 * np.pi) / scale
    share = outside / (outside + inside)
    mixed = 2 * (share * p + (1 - share) * outlying[:, None])
    mixed[every, best] = 0.0
    k = mean.shape[1]
    allowed = min(0.03 * np.sqrt(k), 0.08)  # of an outlier by k times its p, which the wild ratios make conservative
    return np.asarray(np.where(k * outlying <= allowed, np.minimum(plain, mixed.max(1)), plain))


def _estimate(scores: Array, best: NDArray[np.int64], spreads: Spreads, adaptive: bool) -> tuple[Array, Array, Array]:
    """Return the score of the best from seeds that did not select it, and its interval."""
    there: Runs = ~np.isnan(scores)
    every, seeds = np.arange(len(scores)), scores.shape[2]
    fair = np.asarray(there.any(1))
    if adaptive:
        late = np.asarray(fair & ~there.all(1))
        fair = np.where(late.any(1, keepdims=True), late, fair)
    values = np.where(there, scores, 0.0)
    sums, counts = values.sum(2), there.sum(2)
    total, folds = np.zeros(len(scores)), np.zeros(len(scores), dtype=int)
    ratios = np.zeros_like(spreads.ratios[:, 0])
    for seed in range(seeds):
        others = counts - there[:, :, seed]
        eligible: Runs = there[:, :, seed] & (others > 0)
        usable = fair[:, seed] & eligible[every, best]
        by_others = np.where(eligible, (sums - values[:, :, seed]) / np.maximum(others, 1), -np.inf)
        chosen = by_others.argmax(1)
        total += np.where(usable, values[every, chosen, seed], 0.0)
        ratios += np.where(usable[:, None, None], spreads.ratios[every, chosen], 0.0)
        folds += usable
    several = (folds > 0) & (counts[every, best] > 1)
    known = several & spreads.known
    ratios = ratios / np.maximum(folds, 1)[:, None, None]
    estimate = total / np.maximum(folds, 1)
    half = _half_width(spreads, ratios, np.maximum(folds, 1), scores.shape[1])
    missing = np.where(known, 0.0, np.nan)
    estimate = estimate + np.where(several, 0.0, np.nan)
    return estimate, estimate - half + missing, estimate + half + missing


def _half_width(spreads: Spreads, ratios: Array, n: NDArray[np.int64], configurations: int) -> Array:
    """Return half the length of the interval of a mean of n runs that were left out in turn."""
    # A configuration of a large spread leads more often than others do, the more so the more there are.
    odds = max(configurations / 3, 1.0)
    ratios = ratios * np.array([1.0, 1.0, odds**0.3, odds, odds])
    ratios = ratios / np.maximum(ratios.sum(-1, keepdims=True), 1e-12)
    own = _INFLATION**2 * _RATIOS[:, None] ** 2
    variance = spreads.variances[:, :, None, None] * (own + _SEED_RATIOS**2) / n[:, None, None, None]
    weights = spreads.weights[:, :, None, None] * ratios[..., None] * spreads.of_seeds[:, :, None, :]
    error = np.sqrt(variance)
    low, high = np.zeros(len(n)), 40 * error.max((1, 2, 3))
    for _ in range(45):
        middle = (low + high) / 2
        outside = 2 * (weights * _upper(middle[:, None, None, None] / error)).sum((1, 2, 3))
        low, high = np.where(outside > 1 - COVERED, middle, low), np.where(outside > 1 - COVERED, high, middle)
    return np.asarray(high)


def range_tail(k: int, z: Array) -> Array:
    """Return how often the largest of k equal normal means is so far above the smallest: Tukey's range, for z of a pair."""
    if k < 2:
        return np.ones_like(z)
    return _integrated(z, lambda above, node: k * (above - node) ** (k - 1))


def many_to_one_tail(others: int, z: Array) -> Array:
    """Return how often the largest of `others` equal normal means is so far above one named before: Dunnett's, for z of a pair."""
    return _integrated(z, lambda above, node: above**others)


def _integrated(z: Array, inside: Callable[[Array, Array], Array]) -> Array:
    """Return 1 minus the mean of `inside` over a standard normal node and the share of one below node + sqrt(2) z."""
    grid = np.linspace(0.0, 9.0, 400)
    above = _lower(_NODES + np.sqrt(2) * grid[:, None])
    tails = 1 - (_DENSITY * inside(above, _lower(_NODES))).sum(1)
    return np.asarray(np.interp(z, grid, np.clip(tails, 0.0, 1.0)))


def _normalized(log: Array) -> Array:
    found = np.exp(log - log.max(-1, keepdims=True))
    return np.asarray(found / found.sum(-1, keepdims=True))


def _lower(z: Array) -> Array:
    from scipy.special import ndtr  # scipy.stats would take 1 s and 60 MB

    return np.asarray(ndtr(z))


def _upper(z: Array) -> Array:
    return _lower(-z)


def _normal_quantile(p: Array) -> Array:
    from scipy.special import ndtri

    return np.asarray(-ndtri(p))
