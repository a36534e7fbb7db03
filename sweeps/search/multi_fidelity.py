"""Propose configurations by a Gaussian process on the scores of all runs, those that were stopped early included.

The score of a run with choices x after a share s of its epochs is modelled as

    a(s) * (f(x, s) + r(run, s) + noise) + level + slope * log(s) + offset(seed)

f is what configurations have in common (Matérn 5/2 in x, one length a dimension), r what a run has of
its own; both change slowly with log(s). a(s) lets scores of early epochs spread less or more. The
lengths, spreads and rates maximize the marginal likelihood times a prior (Rasmussen and Williams,
Gaussian Processes for Machine Learning, 2006, chapter 5). A proposal maximizes the expected improvement
of f at the last epoch over the best run known, times the chance that a run there does not fail. Runs
that have not ended count as if they would score what the model expects, which spreads the workers
(Ginsbourger et al., 2010). No proposal lies close to a known configuration: to repeat one is what
further seeds are for.

Everything is a function of the arguments: the same runs, search and number give the same proposal.
docs/how-it-works/search-measured.md has what was tried.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr

from sweeps.spec.space import Dimension, Params, Value

Array = NDArray[np.float64]
STARTUP_RUNS = 8  # with fewer scored runs, configurations are spread evenly
_SPACING = 0.7  # least distance to a known configuration, for one of them; for n it shrinks as n^(-1/dimensions)
_FITTED_RUNS, _KNOWN_RUNS = 100, 250  # at most, for the hyperparameters and for the proposal
_CANDIDATES, _NEAR, _LEADERS = 256, 128, 5  # drawn over the space, and around the leaders
_SEED_VARIANCE = 0.1  # of the offset that all runs of a seed share, in units of the scores' variance
# Mean and standard deviation of the prior of each hyperparameter: the logarithms of a length, the
# spreads of f, r and noise, the rate of change with log(s); and the exponent of a(s).
_PRIOR = {"length": (-0.7, 0.7), "f": (0.0, 0.5), "r": (-1.2, 0.5), "noise": (-1.6, 0.5), "rate": (1.6, 0.5), "exponent": (0.3, 0.3)}


@dataclass(frozen=True)
class Run:
    """What is known of one run: its choices, its scores by epoch, and whether it goes on or has failed."""

    params: Params
    seed: int
    epochs: int  # that it trains if nothing stops it
    scores: Mapping[int, float] = field(default_factory=dict)
    pending: bool = False
    failed: bool = False

    @property
    def used(self) -> list[tuple[int, float]]:
        """Return its last score, and earlier ones as long as each is of half the epochs or fewer."""
        found: list[tuple[int, float]] = []
        for epoch in sorted(self.scores, reverse=True):
            if not found or 2 * epoch <= found[-1][0]:
                found.append((epoch, self.scores[epoch]))
        return found


# Choices as numbers.


@dataclass(frozen=True)
class Cube:
    """The space as a unit cube: a coordinate for each dimension, NaN where it does not matter."""

    space: Sequence[Dimension]
    base: Mapping[str, Any]

    def _ends(self, d: Dimension) -> tuple[float, float]:
        """Return the scaled ends of a range; each whole number gets an equal share of it."""
        low, high = (d.low - d.step / 2, d.whole_numbers[-1] + d.step / 2) if d.whole else (d.low, d.high)
        return (math.log(low), math.log(high)) if d.log else (low, high)

    def coordinate(self, d: Dimension, value: Value) -> float:
        """Return the coordinate of a value."""
        if d.options:
            return (list(d.options).index(value) + 0.5) / len(d.options)
        low, high = self._ends(d)
        return ((math.log(float(value)) if d.log else float(value)) - low) / (high - low)

    def value(self, d: Dimension, coordinate: float) -> Value:
        """Return the value at a coordinate."""
        if d.options:
            return d.options[min(int(coordinate * len(d.options)), len(d.options) - 1)]
        low, high = self._ends(d)
        number = low + coordinate * (high - low)
        number = min(max(math.exp(number) if d.log else number, d.low), d.high)
        if not d.whole:
            return number
        return d.whole_numbers[min(round((number - d.low) / d.step), len(d.whole_numbers) - 1)]

    def points(self, many: Sequence[Params]) -> Array:
        """Return a row for each of `many`."""
        rows = [[self.coordinate(d, p[d.key]) if d.key in p else math.nan for d in self.space] for p in many]
        return np.array(rows, dtype=float).reshape(len(many), len(self.space))

    def params(self, point: Array) -> Params:
        """Return the choices at a point, without dimensions that do not matter."""
        chosen: Params = {}
        for d, coordinate in zip(self.space, point, strict=True):
            if d.matters(chosen, self.base):
                chosen[d.key] = self.value(d, float(coordinate))
        return chosen

    def snapped(self, points: Array) -> Array:
        """Return the points with each coordinate at the middle of its option or whole number, NaN where it does not matter."""
        found = points.copy()
        for i, d in enumerate(self.space):
            if d.options:
                found[:, i] = (np.minimum(np.floor(points[:, i] * len(d.options)), len(d.options) - 1) + 0.5) / len(d.options)
            elif d.whole:
                values = [self.value(d, u) for u in points[:, i]]
                found[:, i] = [self.coordinate(d, v) for v in values]
            if d.when is not None:
                found[~self._matters(d, found), i] = np.nan
        return found

    def _matters(self, d: Dimension, points: Array) -> NDArray[np.bool_]:
        """Return for each point whether a conditional dimension matters, given the earlier coordinates."""
        assert d.when is not None
        assert isinstance(d.when[1], tuple)
        by_base = d.matters({}, self.base)
        earlier = next((i for i, e in enumerate(self.space) if e.key == d.when[0]), None)
        if earlier is None:
            return np.full(len(points), by_base)
        known = {u: self.value(self.space[earlier], u) in d.when[1] for u in np.unique(points[:, earlier]) if not math.isnan(u)}
        return np.array([known.get(u, by_base) for u in points[:, earlier]])

    def features(self, points: Array) -> tuple[Array, NDArray[np.intp]]:
        """Return the rows between which distances are taken, and the dimension of each column.

        The distance in a dimension is at most 1. Each option has a column. A dimension that does not
        matter lies at an equal distance from all options, and beside the middle of a range.
        """
        columns: list[Array] = []
        of: list[int] = []
        for i, d in enumerate(self.space):
            u = points[:, i]
            if d.options:
                columns += [0.5**0.5 * (np.floor(u * len(d.options)) == k) for k in range(len(d.options))]
            else:
                columns += [np.where(np.isnan(u), 0.5, u), *([0.5 * ~np.isnan(u)] if d.when is not None else [])]
            of += [i] * (len(columns) - len(of))
        return np.array(columns, dtype=float).T.reshape(len(points), len(of)), np.array(of, dtype=np.intp)


# The model.


@dataclass
class Data:
    """Scores as arrays, one row each: features, log share of the epochs, run, seed, standardized score."""

    x: Array
    of: NDArray[np.intp]
    t: Array
    run: NDArray[np.intp]
    seed: NDArray[np.intp]
    y: Array


def _covariance(theta: Array, a: Data, b: Data) -> tuple[Array, list[Array]]:
    """Return the covariance of scores `a` and `b` without noise, and parts of it that `_fit` differentiates."""
    lengths, (f, r, _, rate), exponent = np.exp(theta[:-5]), np.exp(theta[-5:-1]), theta[-1]
    scaled = 1 / lengths[a.of]
    s = ((a.x * scaled) ** 2).sum(1)[:, None] + ((b.x * scaled) ** 2).sum(1)[None] - 2 * (a.x * scaled) @ (b.x * scaled).T
    root = np.sqrt(5 * np.maximum(s, 0))
    decay = np.exp(-root)
    apart = np.abs(a.t[:, None] - b.t[None])
    spread = np.exp(exponent * (a.t[:, None] + b.t[None]) - apart / rate)
    common = f**2 * (1 + root + root**2 / 3) * decay * spread
    own = r**2 * (a.run[:, None] == b.run[None]) * spread
    mean = 1 + a.t[:, None] * b.t[None] + _SEED_VARIANCE * (a.seed[:, None] == b.seed[None])
    return common + own + mean, [common, own, apart / rate, f**2 * (5 / 3) * (1 + root) * decay * spread]


def _noise(theta: Array, data: Data) -> Array:
    """Return the variance of the noise of each score."""
    return np.asarray(np.exp(2 * theta[-3] + 2 * theta[-1] * data.t) + 1e-6)


def _prior(lengths: int) -> tuple[Array, Array]:
    """Return mean and deviation of the prior of the hyperparameters, lengths first."""
    rows = [_PRIOR["length"]] * lengths + [_PRIOR[k] for k in ("f", "r", "noise", "rate", "exponent")]
    mean, deviation = np.array(rows).T
    return mean, deviation


def fit(data: Data, dimensions: int) -> Array:
    """Return the hyperparameters of highest posterior density."""
    mean, deviation = _prior(dimensions)
    squares = [(data.x[:, None, data.of == d] - data.x[None, :, data.of == d]) ** 2 for d in range(dimensions)]
    squares = [s.sum(-1) for s in squares]
    sums = data.t[:, None] + data.t[None]

    def cost(theta: Array) -> tuple[float, Array]:
        covariance, (common, own, apart, slope) = _covariance(theta, data, data)
        noise = _noise(theta, data)
        lower = cholesky(covariance + np.diag(noise), lower=True, check_finite=False)
        inverse = cho_solve((lower, True), np.eye(len(data.y)), check_finite=False)
        alpha = inverse @ data.y
        weights = inverse - np.outer(alpha, alpha)
        by_length = [(weights * slope * s).sum() / np.exp(2 * theta[d]) for d, s in enumerate(squares)]
        noisy = weights.diagonal() * (noise - 1e-6)
        both = weights * (common + own)
        rest = [2 * (weights * common).sum(), 2 * (weights * own).sum(), 2 * noisy.sum(), (both * apart).sum()]
        rest.append((both * sums).sum() + (2 * noisy * data.t).sum())
        z = (theta - mean) / deviation
        value = 0.5 * data.y @ alpha + np.log(lower.diagonal()).sum() + 0.5 * z @ z
        return float(value), 0.5 * np.array([*by_length, *rest]) + z / deviation

    bounds = [(m - 3 * d, m + 3 * d) for m, d in zip(mean, deviation, strict=True)]
    found = minimize(cost, mean, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 12})
    return np.asarray(found.x, dtype=float)


class Model:
    """The process, given runs: what it expects at the last epoch."""

    def __init__(self, cube: Cube, runs: Sequence[Run], random: np.random.Generator) -> None:
        """Fit it to `runs`; at least one must have a score."""
        self.cube = cube
        scored, ahead = _kept([r for r in runs if r.scores], random), [r for r in runs if r.pending][-_KNOWN_RUNS:]
        scores = np.array([v for r in scored for _, v in r.used])
        low, middle, high = np.quantile(scores, [0.25, 0.5, 0.75])
        scores = np.maximum(scores, middle - 4 * (high - low) if high > low else low)  # diverged runs are bad, however bad
        self.centre, self.scale = float(scores.mean()), float(scores.std()) or 1.0
        self.runs = scored
        data = self._data([(i, r, e) for i, r in enumerate(scored) for e, _ in r.used], (scores - self.centre) / self.scale)
        few = data.run < _FITTED_RUNS if len(scored) > _FITTED_RUNS else np.ones(len(data.y), dtype=bool)
        self.theta = fit(Data(data.x[few], data.of, data.t[few], data.run[few], data.seed[few], data.y[few]), len(cube.space))
        self._condition(data)
        # A pending run with scores is the same run as they are.
        number = {id(r): i for i, r in enumerate(scored)}
        future = [(number.get(id(r), len(scored) + i), r, r.epochs) for i, r in enumerate(ahead)]
        if future:
            more = self._data(future, np.zeros(len(future)))
            more.y = _covariance(self.theta, more, data)[0] @ self.alpha
            joined = (np.concatenate([getattr(data, k), getattr(more, k)]) for k in ("x", "t", "run", "seed", "y"))
            x, t, run, seed, y = joined
            self._condition(Data(x, data.of, t, run, seed, y))

    def _data(self, rows: Sequence[tuple[int, Run, int]], y: Array) -> Data:
        x, of = self.cube.features(self.cube.points([r.params for _, r, _ in rows]))
        t = np.log([e / r.epochs for _, r, e in rows])
        return Data(x, of, t, np.array([i for i, _, _ in rows]), np.array([r.seed for _, r, _ in rows]), y)

    def _condition(self, data: Data) -> None:
        covariance, _ = _covariance(self.theta, data, data)
        self.data, self.lower = data, cholesky(covariance + np.diag(_noise(self.theta, data)), lower=True, check_finite=False)
        self.alpha = cho_solve((self.lower, True), data.y, check_finite=False)

    def expected(self, x: Array) -> Array:
        """Return the mean of f and the level, in standardized scores, at the last epoch of the rows of `x`."""
        return np.asarray(_covariance(self.theta, self._at(x), self.data)[0] @ self.alpha)

    def improvement(self, x: Array, best: Array) -> Array:
        """Return the expected improvement of f at each row of `x` over f at the one row of `best`.

        The level, which few completed runs leave uncertain, is common to both and cancels.
        """
        both = self._at(np.concatenate([best, x]))
        across = _covariance(self.theta, both, self.data)[0]
        half = solve_triangular(self.lower, across.T, lower=True, check_finite=False)
        mean, with_best = across @ self.alpha, _covariance(self.theta, both, self._at(best))[0][:, 0] - half.T @ half[:, 0]
        variance = with_best[0] + (half[:, 0] ** 2).sum() - (half**2).sum(0)  # before data it is that of `best` everywhere
        deviation = np.sqrt(np.maximum(variance + variance[0] - 2 * with_best, 1e-9))[1:]
        z = (mean[1:] - mean[0]) / deviation
        return np.asarray(deviation * (z * ndtr(z) + np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)))

    def _at(self, x: Array) -> Data:
        n = len(x)
        return Data(x, self.data.of, np.zeros(n), np.full(n, -1), np.full(n, -1), np.zeros(n))


def _kept(runs: list[Run], random: np.random.Generator) -> list[Run]:
    """Return the runs for the model in random order if they are too many: the better half by rank, and others at random."""
    if len(runs) <= _FITTED_RUNS:
        return runs
    order = [runs[i] for i in random.permutation(len(runs))]
    if len(runs) <= _KNOWN_RUNS:
        return order
    ranked = sorted(order, key=lambda r: (r.used[0][0] / r.epochs, r.used[0][1]), reverse=True)
    best = {id(r) for r in ranked[: _KNOWN_RUNS // 2]}
    others = [r for r in order if id(r) not in best][: _KNOWN_RUNS - len(best)]
    chosen = best | {id(r) for r in others}
    return [r for r in order if id(r) in chosen]


# The proposal.


def propose(cube: Cube, runs: Sequence[Run], random: np.random.Generator) -> Params:
    """Return the next choices; they differ from those of `runs` unless all candidates are there."""
    points = cube.points([r.params for r in runs])
    drawn = cube.snapped(random.random((_CANDIDATES, len(cube.space))))
    scored = [i for i, r in enumerate(runs) if r.scores]
    if len(scored) < STARTUP_RUNS:
        fresh = _unknown(drawn, points)
        new, old = cube.features(fresh)[0], cube.features(points)[0]
        return cube.params(fresh[int(_squares(new[:64], old).min(1, initial=np.inf).argmax())])
    model = Model(cube, runs, random)
    known = cube.features(points[scored])[0]
    order = np.argsort(-model.expected(known), kind="stable")
    near = cube.snapped(_near(cube, points[scored][order[:_LEADERS]], random))
    fresh = _spaced(cube, _unknown(np.concatenate([drawn, near]), points), points)
    x, _ = cube.features(fresh)
    gain = model.improvement(x, known[order[:1]]) * _succeeds(cube, runs, points, x)
    return cube.params(fresh[int(gain.argmax())])


def _squares(a: Array, b: Array) -> Array:
    """Return the squared distance of each row of `a` to each row of `b`."""
    return np.asarray(np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0))


def _spaced(cube: Cube, drawn: Array, points: Array) -> Array:
    """Return the rows of `drawn` that are not close to one of `points`, at least the tenth furthest from them."""
    apart = _squares(cube.features(drawn)[0], cube.features(points)[0]).min(1)
    least = (_SPACING * len(points) ** (-1 / len(cube.space))) ** 2
    return np.asarray(drawn[apart >= min(least, np.quantile(apart, 0.9))])


def _unknown(drawn: Array, points: Array) -> Array:
    """Return the rows of `drawn` that are not among `points`, or all if there is none."""
    known = {row.tobytes() for row in points}
    fresh = [row.tobytes() not in known for row in drawn]
    return np.asarray(drawn[fresh]) if any(fresh) else drawn


def _near(cube: Cube, best: Array, random: np.random.Generator) -> Array:
    """Return points near `best`, moved in about half of the dimensions."""
    shape = (_NEAR, len(cube.space))
    start, anywhere = best[np.arange(_NEAR) % len(best)], random.random(shape)
    moved = np.clip(start + random.normal(size=shape) * random.choice([0.03, 0.1, 0.3], size=(_NEAR, 1)), 0, 1)
    moved[:, [bool(d.options) for d in cube.space]] = anywhere[:, [bool(d.options) for d in cube.space]]
    return np.where(np.isnan(start), anywhere, np.where(random.random(shape) < 0.5, moved, start))


def _succeeds(cube: Cube, runs: Sequence[Run], points: Array, x: Array) -> Array | float:
    """Return the chance that a run at each row of `x` does not fail, from the ended runs near it."""
    ended = [i for i, r in enumerate(runs) if not r.pending][-_KNOWN_RUNS:]
    good = np.array([not runs[i].failed for i in ended], dtype=float)
    if good.all():
        return 1.0
    at, _ = cube.features(points[ended])
    near = np.exp(-_squares(x, at) / (2 * 0.1**2 * len(cube.space)))
    return np.asarray((0.1 + near @ good) / (0.1 + near.sum(1)), dtype=float)
