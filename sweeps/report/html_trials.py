"""Give the page's script the trials of a sweep: curves, configurations, details and logs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jobs.task import score_format
from sweeps.report import html_text
from sweeps.report.aggregate import Row, title
from sweeps.report.html_curves import Curve
from sweeps.report.html_figures import leaves
from sweeps.report.tables import Cell, PeoplesTable
from sweeps.spec import hyperparameters
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


def places(trials: Sequence[Trial]) -> dict[str, int]:
    """Return configuration -> number, by which the page's script knows it: what tells configurations apart may be long."""
    return {configuration: i for i, configuration in enumerate(dict.fromkeys(t.configuration for t in trials))}


def _text(value: Any) -> str:
    """Return a text that tells values apart, 1 from 1.0 and True too."""
    return json.dumps(value, default=str)


def header(view: View, metrics: Sequence[str], unit: str, keys: Sequence[str] = ()) -> list[str]:
    """Return the columns of the table of trials; `keys` are hyperparameters that get one each."""
    return ["configuration", "trial", "seed", *compared(view, metrics, unit), *keys, "name", "run ID"]


def compared(view: View, metrics: Sequence[str], unit: str) -> list[str]:
    """Return the columns that stand beside the differences of trials: what came out."""
    return ["state", *(title(view, m) for m in metrics), unit, "wall-clock, hours", "starts"]


def cells(view: View, trial: Trial, row: Row, metrics: Sequence[str], keys: Sequence[str] = ()) -> list[str]:
    """Return the fields of a trial in the table of trials."""
    form, result = score_format(view.sweep.task.UNIT), view.result(trial)
    scores = [f"{row.metrics[m]:{form}}" if m in row.metrics else "-" for m in metrics]
    hours, seconds = view.device_hours(trial), result.seconds if result is not None else 0.0
    costs = [f"{hours:.3g}" if hours else "-", f"{seconds / 3600:.3g}" if seconds else "-"]
    values = map(rounded, hyperparameters.cells(trial, keys))
    first = [row.label, f"{trial.number:02d}", str(row.seed), row.state.name, *scores, *costs, str(len(view.claims(trial)) or "-")]
    return [*first, *values, trial.name, trial.signature]


def rounded(text: str) -> str:
    """Return a value of a hyperparameter in at most four digits if it is a number with more."""
    try:
        return f"{float(text):.4g}" if "." in text and len(text) > 7 else text
    except ValueError:
        return text


def scores_first(table: PeoplesTable, keys: int, metrics: int) -> PeoplesTable:
    """Return the table with its `keys` columns of hyperparameters after its `metrics` columns of scores.

    The name of a configuration says what it sets, and a phone has room for little more than one further column.
    """

    def moved(row: Sequence[Any]) -> list[Any]:
        return [row[0], *row[1 + keys : 1 + keys + metrics], *row[1 : 1 + keys], *row[1 + keys + metrics :]]

    def shorter(row: Sequence[Cell]) -> list[Cell]:
        return [*row[:1], *(replace(cell, text=rounded(cell.text)) for cell in row[1 : 1 + keys]), *row[1 + keys :]]

    return PeoplesTable(moved(table.header), [moved(shorter(line)) for line in table.lines], table.notes)


def of_script(
    view: View, trial: Trial, place: int, curves: Mapping[str, Curve], values: Mapping[str, Any], log: str, colour: str, unit: str
) -> dict[str, Any]:
    """Return the data of a trial for the page's script; `values` are those that not all trials have in common.

    `place` is the number of its configuration.
    """
    return {
        "signature": trial.signature,
        "number": trial.number,
        "name": trial.name,
        "configuration": place,
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
