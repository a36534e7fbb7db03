"""Write report.html: one page with the whole sweep, which needs no network."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from cnnjepa.run.files import write_atomic
from jobs.task import score_format
from sweeps.report import html_text
from sweeps.report.aggregate import Row, Summary, columns, rows, run_set, shown_configurations, summaries, title
from sweeps.report.html_curves import Curve, curves_of
from sweeps.report.html_figures import colours, costs_figure, drawn, layout, scores_figure
from sweeps.report.tables import peoples_table
from sweeps.report.usage import advice_lines
from sweeps.search import warnings
from sweeps.spec import hyperparameters
from sweeps.spec.sweep import Trial
from sweeps.state.view import View

_MOST_ROWS = 100  # configurations in the page's table
_MOST_CURVES = 100  # drawn at once
_PAGE = Path(__file__).parent / "page"
Figures = dict[str, tuple[str, go.Figure]]  # ID of its element -> heading and figure


def build(view: View) -> str:
    """Return the page of a sweep in its current state."""
    sweep, metrics, table = view.sweep, columns(view), rows(view)
    keys = hyperparameters.shown(sweep.trials, sweep.search)
    hues, unit = colours(summaries(view)), html_text.hours_unit(view)
    curves = [curves_of(view, t) for t in sweep.trials]
    shown, _ = shown_configurations(view)
    best, not_drawn = drawn(shown, view)
    scores, costs, search = _scores(view, best, hues), _costs(view, shown, hues, unit), _search(view)
    warned = {t.signature: [w.line for w in found] for t in sweep.trials if (found := warnings.warnings_of(view, t))}
    data = {
        "figures": {name: json.loads(figure.to_json()) for name, (_, figure) in (scores | costs | search).items()},
        "trials": [_trial(view, *of_one, hues, unit) for of_one in zip(sweep.trials, table, curves, strict=True)],
        "most_curves": _MOST_CURVES,
        "one": sweep.counted.removesuffix("s"),
        "best_first": _best_first(view),
        "curve_layout": json.loads(layout(go.Figure(), 380).to_json())["layout"],
    }
    return _template().render(
        view=view,
        sweep=sweep,
        text=html_text,
        warned=warned,
        warnings=warnings.as_lines(sweep, warned),
        scores=scores,
        not_drawn=not_drawn,
        table=peoples_table(view, _MOST_ROWS, keys),
        cost_lines=[*html_text.costs(view), *advice_lines(view)],
        costs=costs,
        search=search,
        curves={name: sweep.task.title(name) for name in _offered(curves, sweep.task.CURVES)},
        header=["configuration", *keys, "seed", "state", *(title(view, m) for m in metrics), unit, "starts", "trial", "run ID"],
        trials={t.signature: _cells(view, t, row, metrics, keys) for t, row in zip(sweep.trials, table, strict=True)},
        run_set=run_set(view),
        data=data,
        most_curves=_MOST_CURVES,
        style=(_PAGE / "report.css").read_text(),
        # A script must not close its own element. Its strings and patterns allow the backslash.
        plotly=get_plotlyjs().replace("</script", "<\\/script").replace("<!--", "<\\!--"),
        script=(_PAGE / "report.js").read_text(),
    )


def write(view: View) -> Path:
    """Rebuild report.html; return its path."""
    path = view.sweep.path / "report.html"
    write_atomic(path, build(view))
    return path


def _template() -> jinja2.Template:
    """Return the page's template. It escapes all text and fails on undefined names."""
    folder = jinja2.FileSystemLoader(_PAGE)
    found = jinja2.Environment(
        loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    found.policies["json.dumps_kwargs"] = {"allow_nan": False}  # keys keep their order
    return found.get_template("report.html")


def _scores(view: View, table: Sequence[Summary], hues: Mapping[str, str]) -> Figures:
    shown = [m for m in columns(view) if view.sweep.task.is_pictured(m) and any(s.values.get(m) for s in table)]
    return {f"scores-{i}": (title(view, m), scores_figure(view, table, m, hues)) for i, m in enumerate(shown)}


def _costs(view: View, table: Sequence[Summary], hues: Mapping[str, str], unit: str) -> Figures:
    objective = view.sweep.objective
    done = [s for s in table if s.spreads[objective].n]
    return {"costs": ("", costs_figure(view, done, html_text.hours_of_a_run(view), unit, hues))} if done else {}


def _search(view: View) -> Figures:
    if view.sweep.search is None:
        return {}
    from sweeps.report.search_figures import search_figures

    return {f"search-{i}": found for i, found in enumerate(search_figures(view))}


def _offered(curves: Iterable[Mapping[str, Curve]], first: Sequence[str]) -> list[str]:
    """Return the names of the curves that some trial has, those in `first` first."""
    found = dict.fromkeys(name for of_trial in curves for name in of_trial)
    return [*(n for n in first if n in found), *(n for n in found if n not in first)]


def _trial(view: View, trial: Trial, row: Row, curves: Mapping[str, Curve], hues: Mapping[str, str], unit: str) -> dict[str, Any]:
    """Return the data of a trial for the page's script."""
    return {
        "signature": trial.signature,
        "number": trial.number,
        "name": trial.name,
        "colour": hues.get(trial.configuration, "#888"),
        "curves": {name: _points(curve) for name, curve in curves.items()},
        "about": html_text.about(view, trial, unit),
        "log": html_text.last_lines(view, trial) if row.cause else "",
    }


def _best_first(view: View) -> list[int]:
    """Return the places of the trials in the sweep by score, the best first, those without one last."""
    values = [view.objective(t) for t in view.sweep.trials]
    sign = view.sweep.sign
    return sorted(range(len(values)), key=lambda i: float("inf") if (value := values[i]) is None else -sign * value)


def _points(curve: Curve) -> list[list[float]]:
    return [[float(f"{x:.5g}") for x in curve.epochs], [float(f"{y:.5g}") for y in curve.values]]


def _cells(view: View, trial: Trial, row: Row, metrics: Sequence[str], keys: Sequence[str] = ()) -> list[str]:
    form = score_format(view.sweep.task.UNIT)
    scores = [f"{row.metrics[m]:{form}}" if m in row.metrics else "-" for m in metrics]
    hours = view.device_hours(trial)
    first = [row.label, *hyperparameters.cells(trial, keys), str(row.seed), row.state.name]
    last = [f"{hours:.3g}" if hours else "-", str(len(view.claims(trial)) or "-"), trial.name, trial.signature]
    return [*first, *scores, *last]
