"""Give the page's script the trials of a sweep: curves, configurations, details and logs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.task import score_format
from sweeps.report import html_text
from sweeps.report.aggregate import Row, title
from sweeps.report.html_curves import Curve
from sweeps.report.html_figures import leaves
from sweeps.spec.sweep import Trial
from sweeps.state.view import View

_MISSING = "\0"  # no value of a configuration


def configurations(trials: Sequence[Trial]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return key -> value of what all trials have in common, and of each trial the rest.

    So a page of 1,000 trials does not hold the same hundred values 1,000 times.
    """
    flat = [leaves(t.values) for t in trials]
    keys = sorted({key for values in flat for key in values})
    several = {key for key in keys if len({_text(values.get(key, _MISSING)) for values in flat}) > 1}
    common = {key: flat[0][key] for key in keys if key not in several}
    return common, [{key: values[key] for key in keys if key in several and key in values} for values in flat]


def _text(value: Any) -> str:
    """Return a text that tells values apart, 1 from 1.0 and True too."""
    return json.dumps(value, default=str)


def header(view: View, metrics: Sequence[str], unit: str) -> list[str]:
    """Return the columns of the table of trials."""
    return ["configuration", "seed", "state", *(title(view, m) for m in metrics), unit, "wall-clock, hours", "starts"]


def cells(view: View, trial: Trial, row: Row, metrics: Sequence[str]) -> list[str]:
    """Return the fields of a trial in the table of trials."""
    form, result = score_format(view.sweep.task.UNIT), view.result(trial)
    scores = [f"{row.metrics[m]:{form}}" if m in row.metrics else "-" for m in metrics]
    hours, seconds = view.device_hours(trial), result.seconds if result is not None else 0.0
    costs = [f"{hours:.3g}" if hours else "-", f"{seconds / 3600:.3g}" if seconds else "-"]
    return [row.label, str(row.seed), row.state.name, *scores, *costs, str(len(view.claims(trial)) or "-")]


def of_script(
    view: View, trial: Trial, curves: Mapping[str, Curve], values: Mapping[str, Any], log: str, colour: str, unit: str
) -> dict[str, Any]:
    """Return the data of a trial for the page's script; `values` are those that not all trials have in common."""
    return {
        "signature": trial.signature,
        "name": f"{trial.label}, seed {trial.seed}",
        "configuration": trial.configuration,
        "colour": colour,
        "curves": {name: _points(curve) for name, curve in curves.items()},
        "values": {
            key: value if isinstance(value, (str, int, float, bool)) or value is None else str(value) for key, value in values.items()
        },
        "about": html_text.about(view, trial, unit),
        "log": log,
    }


def _points(curve: Curve) -> list[list[float]]:
    return [[float(f"{x:.5g}") for x in curve.epochs], [float(f"{y:.5g}") for y in curve.values]]
