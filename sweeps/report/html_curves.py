"""Read the metrics that trials logged, thinned to what a screen can show."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.spec.sweep import Trial
from sweeps.state.view import View

# For all trials together, so that a page of 1,000 trials opens as fast as one of ten.
_MOST_POINTS = 40_000
_FEWEST_OF_A_CURVE, _MOST_OF_A_CURVE = 16, 240
_NO_CURVE = frozenset({"kind", "step", "epoch"})


@dataclass(frozen=True)
class Curve:
    """One metric of one trial over its epochs. Merged records are averaged."""

    epochs: list[float]
    values: list[float]


def points_of_a_curve(trials: int) -> int:
    """Return the maximum points per curve if a page shows `trials` trials."""
    return min(max(_MOST_POINTS // max(trials, 1), _FEWEST_OF_A_CURVE), _MOST_OF_A_CURVE)


def thinned(epochs: Sequence[float], values: Sequence[float], most: int) -> Curve:
    """Return at most `most` points: means over equal numbers of records, and the last record."""
    if len(values) <= most:
        return Curve(list(epochs), list(values))
    found, stretch = Curve([], []), -(-(len(values) - 1) // (most - 1))
    for start in range(0, len(values) - 1, stretch):
        end = min(start + stretch, len(values) - 1)
        found.epochs.append(statistics.fmean(epochs[start:end]))
        found.values.append(statistics.fmean(values[start:end]))
    found.epochs.append(epochs[-1])
    found.values.append(values[-1])
    return found


def curves(records: Sequence[Mapping[str, Any]], most: int) -> dict[str, Curve]:
    """Return name -> curve, of step and probe records. Null values get no point."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for key, value in record.items():
            if key in _NO_CURVE or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            epochs, values = found.setdefault(key, ([], []))
            epochs.append(float(record["epoch"]))
            values.append(float(value))
    return {key: thinned(epochs, values, most) for key, (epochs, values) in found.items()}


def curves_of(view: View, trial: Trial) -> dict[str, Curve]:
    """Return the curves of one trial, {} if it has not begun."""
    return curves(view.records(trial), points_of_a_curve(len(view.sweep.trials)))
