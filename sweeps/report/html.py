"""Write report.html: one page with the whole sweep, which needs no network."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from cnnjepa.run.files import write_atomic
from sweeps.report import html_text, html_trials
from sweeps.report.aggregate import Summary, columns, title
from sweeps.report.best import is_estimated, score_of_best
from sweeps.report.html_curves import Curve, curves_of
from sweeps.report.html_figures import colours, costs_figure, drawn, layout, scores_figure
from sweeps.report.html_lines import add_lines
from sweeps.report.seen import Seen
from sweeps.report.tables import PeoplesTable, peoples_table, results_csv, summary_csv
from sweeps.report.usage import advice_lines
from sweeps.search import warnings
from sweeps.spec import hyperparameters
from sweeps.state.view import View

_LONG_NAME = 30  # characters, of which a column is wide where there is room
_MOST_ROWS = 100  # configurations in the page's table
_MOST_CURVES = 100  # drawn at once
_GREY = "#5b5f66"  # of trials without a colour
_PAGE = Path(__file__).parent / "page"
_SCRIPTS = ("figures.js", "details.js", "tables.js", "start.js")
Figures = dict[str, tuple[str, go.Figure]]  # ID of its element -> heading and figure


def build(view: View) -> str:
    """Return the page of a sweep in its current state."""
    sweep, seen = view.sweep, Seen(view)
    hues, unit = colours(seen.table), html_text.hours_unit(view)
    keys = hyperparameters.shown(sweep.trials, sweep.search)
    curves = [curves_of(view, t) for t in sweep.trials]
    shown = seen.shown[0]
    best, not_drawn = drawn(shown, view)
    scores, costs, search = _scores(seen, best, hues), _costs(seen, shown, hues, unit), _search(seen, unit)
    metrics = columns(view)
    table = html_trials.scores_first(peoples_table(view, _MOST_ROWS, keys, seen), len(keys), len(metrics))
    warned = {t.signature: [w.line for w in found] for t in sweep.trials if (found := warnings.warnings_of(view, t))}
    answer, beside = html_text.answer(view, seen), html_text.beside_the_answer(view, seen)
    failures, places = html_text.failures(view, seen), html_trials.places(sweep.trials)
    return _template().render(
        view=view,
        sweep=sweep,
        text=html_text,
        tiles=html_text.tiles(view, seen),
        answer=answer,
        beside=beside,
        named=_named(seen),
        warned=warned,
        warnings=warnings.as_lines(sweep, warned),
        scores=scores,
        not_drawn=not_drawn,
        table=table,
        notes=_notes(table, [answer[0], *beside], seen),
        best=score_of_best(view, seen.lead) if seen.lead is not None and is_estimated(seen.lead) else "",
        configurations=[places[s.key] for s in shown[:_MOST_ROWS]],
        cost_lines=[*html_text.costs(view), *advice_lines(view)],
        costs=costs,
        search=search,
        choices=_choices(seen, curves),
        curves={name: sweep.task.title(name) for name in _offered(curves, sweep.task.CURVES)},
        header=html_trials.header(view, metrics, unit, keys),
        trials={t.signature: html_trials.cells(view, t, row, metrics, keys) for t, row in zip(sweep.trials, seen.rows, strict=True)},
        failures=failures,
        long=max(len(t.label) for t in sweep.trials) > _LONG_NAME,
        data=_data(seen, scores | costs | search, curves, hues, unit),
        most_curves=_MOST_CURVES,
        style=(_PAGE / "report.css").read_text(),
        # A script must not close its own element. Its strings and patterns allow the backslash.
        plotly=get_plotlyjs().replace("</script", "<\\/script").replace("<!--", "<\\!--"),
        script="\n".join((_PAGE / name).read_text() for name in _SCRIPTS),
    )


def _data(seen: Seen, figures: Figures, curves: Sequence[Mapping[str, Curve]], hues: Mapping[str, str], unit: str) -> dict[str, Any]:
    """Return what the page's script reads."""
    view, trials = seen.view, seen.view.sweep.trials
    common, own = html_trials.configurations(trials)
    logs, places = html_text.logs_of(view), html_trials.places(trials)
    return {
        "name": view.sweep.path.name,
        "figures": {name: json.loads(figure.to_json()) for name, (_, figure) in figures.items()},
        "common": {
            key: value if isinstance(value, (str, int, float, bool)) or value is None else str(value) for key, value in common.items()
        },
        "trials": [
            html_trials.of_script(
                view,
                trial,
                places[trial.configuration],
                of_trial,
                values,
                logs.get(trial.signature, ""),
                hues.get(trial.configuration, _GREY),
                unit,
            )
            for trial, of_trial, values in zip(trials, curves, own, strict=True)
        ],
        "files": {"results.csv": results_csv(view), "summary.csv": summary_csv(view)},
        "compared": html_trials.compared(view, columns(view), unit),
        "most_curves": _MOST_CURVES,
        "one": view.sweep.counted.removesuffix("s"),
        "best_first": _best_first(view),
        "curve_layout": json.loads(layout(go.Figure(), 380).to_json())["layout"],
    }


def _named(seen: Seen) -> Any:
    """Return a filter of the template that sets the names of configurations apart in a sentence."""
    first = seen.view.sweep.trials[0]
    summaries = [s for s in (seen.lead.best, seen.lead.other) if s is not None] if seen.lead else []
    names = {first.label, *(name for s in summaries for name in (s.label, html_text.called(s.label)))} - {""}
    return lambda line: _set_apart(line, sorted(names, key=len, reverse=True))


def _set_apart(line: str, names: Sequence[str]) -> Markup:
    """Return `line` as markup, in which each of `names` that stands alone is bold; the longest ones come first."""
    one_of = "|".join(rf"(?<![\w.]){re.escape(name)}(?![\w.]\w|\w)" for name in names)
    parts = re.split(f"({one_of})", line) if names else [line]
    return Markup("").join(Markup("<b>{}</b>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts))


def _notes(table: PeoplesTable, said: Sequence[str], seen: Seen) -> list[str]:
    """Return the notes of the page's table, without those that the answer has said."""
    above = {line.rstrip(".").lower() for line in said}
    objective = title(seen.view, seen.view.sweep.objective)
    return [note for note in table.notes if note.lower() not in above and not note.startswith(f"{objective}: ")]


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


def _scores(seen: Seen, table: Sequence[Summary], hues: Mapping[str, str]) -> Figures:
    view = seen.view
    shown = [m for m in columns(view) if view.sweep.task.is_pictured(m) and any(s.values.get(m) for s in table)]
    return {f"scores-{i}": (title(view, m), add_lines(scores_figure(view, table, m, hues), seen, table, m)) for i, m in enumerate(shown)}


def _costs(seen: Seen, table: Sequence[Summary], hues: Mapping[str, str], unit: str) -> Figures:
    view, objective = seen.view, seen.view.sweep.objective
    done = [s for s in table if s.spreads[objective].n]
    heading = f"{title(view, objective)} against {unit}"
    return {"costs": (heading, costs_figure(view, done, html_text.hours_of_a_run(view), unit, hues))} if done else {}


def _search(seen: Seen, unit: str) -> Figures:
    if seen.view.sweep.search is None:
        return {}
    from sweeps.report.search_budget import budget_figure
    from sweeps.report.search_figures import search_figures

    first = budget_figure(seen, unit)
    found = [*([first] if first is not None else []), *search_figures(seen.view)]
    return {f"search-{i}": figure for i, figure in enumerate(found)}


def _choices(seen: Seen, curves: Sequence[Mapping[str, Curve]]) -> list[str]:
    if seen.view.sweep.search is None:
        return []
    from sweeps.report.search_budget import other_choices

    return other_choices(seen, curves)


def _offered(curves: Iterable[Mapping[str, Curve]], first: Sequence[str]) -> list[str]:
    """Return the names of the curves that some trial has, those in `first` first."""
    found = dict.fromkeys(name for of_trial in curves for name in of_trial)
    return [*(n for n in first if n in found), *(n for n in found if n not in first)]


def _best_first(view: View) -> list[int]:
    """Return the places of the trials in the sweep by score, the best first, those without one last."""
    values = [view.objective(t) for t in view.sweep.trials]
    sign = view.sweep.sign
    return sorted(range(len(values)), key=lambda i: float("inf") if (value := values[i]) is None else -sign * value)
