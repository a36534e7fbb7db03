"""Show what a search has bought with its budget, and what another choice than by the objective would have cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from jobs.task import score_format
from sweeps.report.aggregate import in_units, title
from sweeps.report.html_curves import Curve
from sweeps.report.html_figures import PALETTE, layout
from sweeps.report.html_text import called
from sweeps.report.seen import Seen
from sweeps.spec.sweep import Trial
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

_ORDERS = 400  # random ones
_BAND = (5.0, 95.0)  # percentiles
_FEWEST = 5  # runs with a score, for a figure; configurations, for a choice
_GRID = 120  # budgets in the figure
_RANKME, _LOSS = "rankme", "loss"


@dataclass(frozen=True)
class Spent:
    """Ended runs in the order in which they were chosen: what each cost, and its score or NaN."""

    costs: NDArray[np.float64]
    scores: NDArray[np.float64]
    unit: str


def spent(view: View, hours_unit: str) -> Spent:
    """Return what the ended runs cost, in hours if they are known, else in epochs or steps.

    Only runs of the first seed have a score here: further seeds are of the best alone, whose highest
    run is not what a search finds.
    """
    ended = [t for t in view.sweep.trials if view.state(t).ended]
    hours = [view.device_hours(t) for t in ended]
    first = view.sweep.trials[0].seed
    known = [view.objective(t) if t.seed == first and view.state(t) is TrialState.completed else None for t in ended]
    costs, unit = (hours, hours_unit) if any(hours) else ([_length(view, t) for t in ended], view.sweep.counted)
    return Spent(np.array(costs, dtype=float), np.array([np.nan if v is None else v for v in known], dtype=float), unit)


def _length(view: View, trial: Trial) -> float:
    """Return how many epochs or steps a run has trained: all, or up to the last probe before it was stopped."""
    if view.state(trial) is TrialState.completed:
        return float(trial.epochs)
    return max(map(float, view.probes(trial)), default=0.0)


def best_at(found: Spent, budgets: NDArray[np.float64], order: NDArray[np.int64], sign: float) -> NDArray[np.float64]:
    """Return the best score once each of `budgets` is spent, if runs end in `order`; NaN before the first."""
    ends = np.cumsum(found.costs[order])
    best = np.fmax.accumulate(np.where(np.isnan(found.scores[order]), -np.inf, sign * found.scores[order]))
    places = np.searchsorted(ends, budgets * (1 + 1e-9), side="right") - 1
    values = np.where(places >= 0, best[np.maximum(places, 0)], -np.inf)
    return np.asarray(np.where(np.isneginf(values), np.nan, sign * values))


def budget_figure(seen: Seen, hours_unit: str) -> tuple[str, go.Figure] | None:
    """Return heading and figure of the best score so far against the budget, or None with too few runs.

    The band is of the same runs in random orders: a search that has learned is above it.
    """
    view = seen.view
    found = spent(view, hours_unit)
    if np.isfinite(found.scores).sum() < _FEWEST or not found.costs.sum():
        return None
    budgets = np.linspace(0.0, found.costs.sum(), _GRID + 1)[1:]
    chance = np.random.default_rng(0)
    orders = [chance.permutation(len(found.costs)) for _ in range(_ORDERS)]
    lines = np.array([best_at(found, budgets, order, view.sweep.sign) for order in orders])
    often = np.isfinite(lines).all(0)  # from where each order has a score
    low, middle, high = np.percentile(lines[:, often], [_BAND[0], 50.0, _BAND[1]], axis=0)
    figure, xs = go.Figure(), budgets[often]
    edge = {"x": xs, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    figure.add_scatter(y=low, showlegend=False, **edge)
    figure.add_scatter(y=high, fill="tonexty", fillcolor="rgba(91, 95, 102, 0.25)", name="random orders, 5 to 95 %", **edge)
    figure.add_scatter(x=xs, y=middle, mode="lines", line={"color": "#5b5f66", "dash": "dash"}, name="their median")
    own = best_at(found, budgets, np.arange(len(found.costs)), view.sweep.sign)
    line = {"color": PALETTE[0], "width": 2.5, "shape": "hv"}
    figure.add_scatter(x=budgets[np.isfinite(own)], y=own[np.isfinite(own)], mode="lines", line=line, name="this search")
    figure.update_xaxes(title=f"{found.unit} spent", rangemode="tozero")
    figure.update_yaxes(title=in_units(view, title(view, view.sweep.objective), "{}, {}"))
    layout(figure, 380).update_layout(
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        meta=f"band: the same runs in {_ORDERS} random orders; best single run of the first seed",
    )
    return "Best so far against budget", figure


def other_choices(seen: Seen, curves: Sequence[Mapping[str, Curve]]) -> list[str]:
    """Return a line for RankMe and one for the loss: what choosing by it would have cost in score."""
    view = seen.view
    trials = view.sweep.trials
    results = [view.result(t) for t in trials]
    names = dict.fromkeys(m for r in results if r is not None for m in r.metrics if m.rpartition(".")[2].lower() == _RANKME)
    lines = []
    for name in names:
        values = {t.signature: r.metrics[name] for t, r in zip(trials, results, strict=True) if r is not None and name in r.metrics}
        lines.append(_choice(seen, title(view, name), values, 1.0))
    if view.sweep.objective.rpartition(".")[2] != _LOSS:
        ends = {t.signature: c[_LOSS].values[-1] for t, c in zip(trials, curves, strict=True) if _LOSS in c}
        lines.append(_choice(seen, "the final loss", ends, -1.0))
    return [line for line in lines if line]


def _choice(seen: Seen, name: str, values: Mapping[str, float], sign: float) -> str:
    """Return 'choosing by the final loss would have given #12 with 64.2, 5.6 below the highest mean ...', or ""."""
    view = seen.view
    by: dict[str, list[float]] = {}
    for trial in view.sweep.trials:
        if trial.signature in values and view.state(trial) is TrialState.completed and view.objective(trial) is not None:
            by.setdefault(trial.configuration, []).append(values[trial.signature])
    known = [
        (s, sum(by[s.key]) / len(by[s.key]), mean)
        for s in seen.table
        if s.key in by and (mean := s.spreads[view.sweep.objective].mean) is not None
    ]
    if len(known) < _FEWEST:
        return ""
    chosen, _, mean = max(known, key=lambda one: sign * one[1])
    best = max(view.sweep.sign * one[2] for one in known)
    agreement = rank_correlation([sign * one[1] for one in known], [view.sweep.sign * one[2] for one in known])
    form = score_format(view.sweep.task.UNIT, 1)
    lost = best - view.sweep.sign * mean
    cost = f"{in_units(view, f'{lost:{form}}')} worse than the best mean" if lost > 0 else "the best by the objective too"
    said = f"choosing by {name}: {called(chosen.label)} with {mean:{form}}, {cost}"
    return f"{said}; rank correlation {agreement:.2f} over {len(known)} configurations"


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's correlation, 0 where either is constant; equal values share their rank."""

    def ranks(values: Sequence[float]) -> NDArray[np.float64]:
        array = np.array(values, dtype=float)
        return np.asarray((array[:, None] > array).sum(1) + (array[:, None] == array).sum(1) / 2)

    a, b = ranks(one), ranks(other)
    a, b = a - a.mean(), b - b.mean()
    length = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / length if length else 0.0
