"""Multinomial logistic regression on standardised features, solved until it has converged.

The objective is that of scikit-learn's LogisticRegression(C=1 / strength) for three classes or
more, divided by the number of images N:

    f(W, b) = mean cross-entropy of (X W^T + b) + strength / (2 N) ||W||^2

It is convex, and its penalty bounds its curvature from below by strength / N. A gradient of norm
e strength / N ||W|| therefore puts W within e ||W|| of the solution and f within e^2 f of its least
value, up to the intercept. That e is the tolerance.

L-BFGS minimises it. Its first guess of the inverse Hessian is (c S + strength / N)^-1 for each class,
with S the covariance of the features and c the mean of p (1 - p) of the class. Badly conditioned
features then take tens of iterations and not thousands.

Weights, sums and the softmax are float64, the products with the features float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cnnjepa.randomness import Stream, generator

CHUNK_ROWS = 8192  # sums follow this grid whether standardised features are kept or not
PAIRS = 10  # steps and changes of the gradient that L-BFGS remembers
SMALLEST_GRADIENT = 1e-10  # a gradient of a smaller norm is zero
STRENGTHS = tuple(10 ** (k / 2) for k in range(12, -7, -1))  # 1e6 to 1e-3
WITHOUT_CHOICE = 1.0  # the strength where no class has two images
HELD_SHARE = 0.2  # of the fitted images, to choose the strength on
PATH_TOLERANCE = 10  # times the tolerance: choosing needs less than scoring
WORSE_IN_A_ROW = 2  # strengths without a new best loss that end the path
_FLATTER, _TRIALS = 0.8, 30  # of a line search


class NotConvergedError(RuntimeError):
    """Raised where a score would rest on weights that are not the solution."""


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        import psutil

        return int(psutil.virtual_memory().available)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + reusable


class Standardised:
    """Hold the rows `order_N` of features with mean 0 and std 1, fp32 on `device`.

    A column whose std is below float32's resolution at its largest value is constant and counts as
    zero. The features may lie on another device. A standardised copy is kept where it fits in half
    of the free memory. Otherwise each pass computes it again, chunk by chunk, to the same bits.
    """

    def __init__(self, features_NC: Tensor, order_N: Tensor, device: torch.device, keep: bool | None = None) -> None:
        self.features, self.order, self.device = features_NC, order_N.to(features_NC.device), device
        self.count, self.channels = features_NC.shape
        total = torch.zeros(self.channels, dtype=torch.float64, device=features_NC.device)
        squares, largest = torch.zeros_like(total), torch.zeros_like(total)
        for part in features_NC.split(CHUNK_ROWS):
            total += part.double().sum(0)
        self.mean = total / self.count
        for part in features_NC.split(CHUNK_ROWS):
            squares += (part.double() - self.mean).square_().sum(0)
            largest = torch.maximum(largest, part.abs().amax(0).double())
        std = (squares / self.count).sqrt()
        self.scale = torch.where(std > torch.finfo(torch.float32).eps * largest, 1 / std, 0.0)
        self._whole: Tensor | None = None
        if keep if keep is not None else 4 * features_NC.numel() <= _free_bytes(device) / 2:
            whole = torch.empty(features_NC.shape, device=device)
            for chunk, part in self.chunks(0, self.count):
                whole[chunk] = part
            self._whole = whole

    def of(self, features_MC: Tensor) -> Tensor:
        """Return any features by the same mean and std."""
        return ((features_MC.double() - self.mean) * self.scale).to(self.device, torch.float32)

    def chunks(self, first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield the rows from `first` to `last` in chunks."""
        for start in range(first, last, CHUNK_ROWS):
            chunk = slice(start, min(start + CHUNK_ROWS, last))
            yield chunk, self.of(self.features[self.order[chunk]]) if self._whole is None else self._whole[chunk]

    def covariance(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues [C] and eigenvectors [C, C] of the covariance, float64."""
        sums = torch.zeros(self.channels, self.channels, dtype=torch.float64, device=self.device)
        for _, part in self.chunks(0, self.count):
            sums += part.T @ part
        values, vectors = torch.linalg.eigh(sums / self.count)
        return values.clamp_min_(0), vectors


@dataclass
class Fit:
    """Hold weights [K, C + 1], the intercept last, and how they were found.

    `gradient` is the gradient's norm as a multiple of strength / N ||W||: the e of the tolerance.
    """

    weights: Tensor
    strength: float
    objective: float
    gradient: float
    iterations: int
    converged: bool

    def scores(self, rows_MC: Tensor) -> Tensor:
        """Return the scores [M, K] of standardised rows, float64."""
        return (rows_MC @ self.weights[:, :-1].to(rows_MC.dtype).T).double() + self.weights[:, -1]


class Problem:
    """Predict the classes of the first `count` rows; every class must be among them."""

    def __init__(self, rows: Standardised, labels_N: Tensor, count: int, eigen: tuple[Tensor, Tensor]) -> None:
        """Take the labels in the order of `rows`."""
        self.rows, self.labels, self.count = rows, labels_N, count
        self.eigenvalues, self.eigenvectors = eigen
        shares = torch.bincount(labels_N[:count]).double() / count
        self.start = torch.zeros(len(shares), rows.channels + 1, dtype=torch.float64, device=rows.device)
        self.start[:, -1] = shares.log() - shares.log().mean()
        self.uncertainty = torch.zeros_like(shares)  # mean of p (1 - p) where evaluated last, by class

    def evaluate(self, weights: Tensor, alpha: float) -> tuple[float, Tensor]:
        """Return the objective and its gradient; `alpha` is strength / N."""
        narrow, gradient = weights[:, :-1].to(torch.float32), torch.zeros_like(weights)
        loss, uncertainty = weights.new_zeros(()), torch.zeros_like(self.uncertainty)
        for chunk, part in self.rows.chunks(0, self.count):
            labels = self.labels[chunk, None]
            scores = (part @ narrow.T).double()
            log_p = (scores + weights[:, -1]).log_softmax(1)
            loss -= log_p.gather(1, labels).sum()
            p = log_p.exp_()
            uncertainty += p.sum(0) - p.square().sum(0)
            p.scatter_add_(1, labels, p.new_full(labels.shape, -1.0))
            gradient[:, :-1] += p.to(torch.float32).T @ part
            gradient[:, -1] += p.sum(0)
        gradient /= self.count
        gradient[:, :-1] += alpha * weights[:, :-1]
        self.uncertainty = uncertainty / self.count
        return float(loss / self.count + alpha / 2 * weights[:, :-1].square().sum()), gradient

    def held_loss(self, fit: Fit) -> float:
        """Return the mean cross-entropy of the rows after the first `count`."""
        total = 0.0
        for chunk, part in self.rows.chunks(self.count, self.rows.count):
            total -= float(fit.scores(part).log_softmax(1).gather(1, self.labels[chunk, None]).sum())
        return total / (self.rows.count - self.count)

    def solve(self, strength: float, tolerance: float, max_iterations: int, start: Tensor | None = None) -> Fit:
        """Return the weights at `strength`, starting from `start`; `converged` says whether they are the solution."""
        alpha, channels = strength / self.count, self.rows.channels
        weights = self.start if start is None else start
        value, gradient = self.evaluate(weights, alpha)
        curvature = self.uncertainty.clamp_min(max(0.01 * float(self.uncertainty.mean()), 1e-30))[:, None]
        inverse = torch.cat([1 / (curvature * self.eigenvalues + alpha), 1 / curvature], 1)

        def newton_like(v: Tensor) -> Tensor:
            turned = torch.cat([v[:, :channels] @ self.eigenvectors, v[:, channels:]], 1) * inverse
            return torch.cat([turned[:, :channels] @ self.eigenvectors.T, turned[:, channels:]], 1)

        def reached() -> float:
            norm, unit = float(gradient.norm()), alpha * float(weights[:, :-1].norm())
            return 0.0 if norm <= SMALLEST_GRADIENT else norm / unit if unit else math.inf

        pairs: list[tuple[Tensor, Tensor, float]] = []
        size, iterations = 1.0, 0
        while not reached() <= tolerance and iterations < max_iterations:
            iterations += 1
            direction, factors = gradient.clone(), []
            for step, change, product in reversed(pairs):
                factors.append(float((step * direction).sum()) / product)
                direction -= factors[-1] * change
            direction = size * newton_like(direction)
            for (step, change, product), factor in zip(pairs, reversed(factors), strict=True):
                direction += (factor - float((change * direction).sum()) / product) * step
            found = self._descend(weights, value, gradient, -direction, alpha)
            if found is None and not pairs:
                break  # rounding hides every descent
            if found is None:
                pairs, size = [], 1.0
                continue
            step, value, after = found
            change = after - gradient
            weights, gradient, product = weights + step, after, float((step * change).sum())
            if product > 0:
                pairs = [*pairs, (step, change, product)][-PAIRS:]
                size = product / float((change * newton_like(change)).sum())
        return Fit(weights, strength, value, reached(), iterations, reached() <= tolerance)

    def _descend(
        self, weights: Tensor, value: float, gradient: Tensor, direction: Tensor, alpha: float
    ) -> tuple[Tensor, float, Tensor] | None:
        """Return a step along `direction`, and objective and gradient after it; None where there is none.

        Along a line the slope of a convex function only rises. The step ends where it is at most 0.8
        of what it was, and where the objective has not risen by more than rounding.
        """
        slope = float((gradient * direction).sum())
        most = value + 100 * torch.finfo(torch.float32).eps * abs(value)
        low, low_slope, high, high_slope, size = 0.0, slope, math.inf, math.inf, 1.0
        for _ in range(_TRIALS if slope < 0 else 0):
            after, gradient = self.evaluate(weights + size * direction, alpha)
            now = float((gradient * direction).sum())
            fell = math.isfinite(after) and after <= most
            if fell and abs(now) <= -_FLATTER * slope:
                return size * direction, after, gradient
            if fell and now < 0:
                low, low_slope = size, now
            else:
                high, high_slope = size, now if math.isfinite(now) else math.inf
            if math.isinf(high):
                size *= 4
            else:
                share = low_slope / (low_slope - high_slope) if 0 < high_slope < math.inf else 0.5
                size = low + min(max(share, 0.1), 0.9) * (high - low)
        return None


def stratified(labels_N: Tensor) -> tuple[Tensor, int]:
    """Return an order of the images and how many of its first are fitted, the rest being held to choose on.

    A fifth of each class is held, at least one and never all of its images.
    """
    shuffled = torch.from_numpy(generator(0, Stream.probe).permutation(len(labels_N))).to(labels_N.device)
    by_class = shuffled[labels_N[shuffled].argsort(stable=True)]
    sizes = labels_N.bincount()
    held = (HELD_SHARE * sizes).round().long().clamp_min(1).minimum(sizes - 1)
    labels = labels_N[by_class]
    is_held = torch.arange(len(labels), device=labels.device) - (sizes.cumsum(0) - sizes)[labels] < held[labels]
    order = torch.cat([by_class[~is_held].sort().values, by_class[is_held].sort().values])
    return order, int((~is_held).sum())


def fit(features_NC: Tensor, labels_N: Tensor, tolerance: float, max_iterations: int, keep: bool | None = None) -> tuple[Fit, Standardised]:
    """Choose the strength on a part of the images, fit all of them with it, and return the fit.

    The path goes from strong to weak, each strength starting from the weights of the last one. The
    strength with the least cross-entropy on the held part is chosen, the stronger one if two tie.
    The path ends after two strengths in a row that are no new best, or where one does not converge.

    `labels_N` holds every class from 0 on; its device computes. Raises NotConvergedError if the
    chosen fit, or the first of the path, does not converge.
    """
    order, count = stratified(labels_N)
    rows = Standardised(features_NC, order, labels_N.device, keep)
    labels, eigen = labels_N[order], rows.covariance()
    best, least, start, worse = None, math.inf, None, 0
    part = Problem(rows, labels, count, eigen)
    for strength in [s for s in STRENGTHS if s <= len(labels)] if count < len(labels) else []:
        found = part.solve(strength, PATH_TOLERANCE * tolerance, max_iterations, start)
        if not found.converged:
            break
        start, loss = found.weights, part.held_loss(found)
        worse = 0 if loss < least else worse + 1
        if loss < least:
            best, least = found, loss
        elif worse == WORSE_IN_A_ROW:
            break
    if best is None and count < len(labels):
        raise NotConvergedError(_cause(found, PATH_TOLERANCE * tolerance))
    strength, start = (best.strength, best.weights) if best else (WITHOUT_CHOICE, None)
    whole = Problem(rows, labels, len(labels), eigen).solve(strength, tolerance, max_iterations, start)
    if not whole.converged:
        raise NotConvergedError(_cause(whole, tolerance))
    return whole, rows


def _cause(found: Fit, tolerance: float) -> str:
    return (
        f"the fit at strength {found.strength:.3g} has not converged: its relative gradient is {found.gradient:.3g} "
        f"after {found.iterations} iterations and must be at most {tolerance:g} (probes.linear_tolerance, probes.linear_max_iterations)"
    )
