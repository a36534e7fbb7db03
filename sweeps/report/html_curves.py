"""What trials told while they trained, thinned to what a screen can show."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cnnjepa.run.folder import read_metrics
from sweeps.spec.sweep import Trial
from sweeps.state.folder import View

# Of all trials together: a page of a thousand trials must open as well as one of ten.
_MOST_POINTS = 60_000
_FEWEST_OF_A_CURVE, _MOST_OF_A_CURVE = 16, 240
_NO_CURVE = frozenset({"kind", "step", "epoch"})


@dataclass(frozen=True)
class Curve:
    """One number of one trial over its epochs; where records were put together, their means."""

    epochs: list[float]
    values: list[float]


def points_of_a_curve(trials: int) -> int:
    """How many points a curve may have where so many trials are shown."""
    return min(max(_MOST_POINTS // max(trials, 1), _FEWEST_OF_A_CURVE), _MOST_OF_A_CURVE)


def thinned(epochs: Sequence[float], values: Sequence[float], most: int) -> Curve:
    """At most `most` points: means over stretches of equally many records, and the last record as it is."""
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
    """Name -> curve: of steps by their key, of probes, those at the end among them, by their metric; what is null has no point."""
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
    """The curves of one trial; none where it has not begun."""
    records = read_metrics(view.sweep.trial_dir(trial) / "metrics.jsonl")
    return curves(records, points_of_a_curve(len(view.sweep.trials)))
