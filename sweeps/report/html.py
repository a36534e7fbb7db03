"""report.html: one page that holds a whole sweep, needs no network, and can be made anew at any time from the run folders."""

import json
import string
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from cnnjepa.run.files import write_atomic
from sweeps.report import html_text
from sweeps.report.aggregate import Row, Summary, columns, rows, run_set, summaries, title, told_settings
from sweeps.report.html_curves import Curve, curves_of
from sweeps.report.html_figures import colours, costs_figure, layout, scores_figure
from sweeps.report.tables import peoples_table
from sweeps.report.usage import advice_lines
from sweeps.search import warnings
from sweeps.spec.sweep import Trial
from sweeps.state.folder import View

_PAGE = Path(__file__).parent / "page"
# The order in which curves are offered; what a method logs beside them comes after.
_CURVES = (
    "loss",
    "linear.holdout_top1",
    "knn.holdout_top1",
    "collapse.feature_std",
    "collapse.rankme",
    "gradient_norm",
    "images_per_second",
)


def tag(name: str, content: str, **attributes: str) -> str:
    """An element; `content` is markup already, attributes are text. A trailing _ of their names is dropped, others are hyphens."""
    told = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{told}>{content}</{name}>"


def items(lines: Sequence[str]) -> str:
    """A list of plain lines."""
    return tag("ul", "".join(tag("li", escape(line)) for line in lines))


class Page:
    """The page as it grows: its markup, and the figures that its script draws."""

    def __init__(self) -> None:
        self.body: list[str] = []
        self.figures: dict[str, Any] = {}

    def add(self, *markup: str) -> None:
        """Markup, in order."""
        self.body += markup

    def figure(self, name: str, figure: Any, heading: str = "") -> str:
        """The place of a figure."""
        self.figures[name] = json.loads(figure.to_json())
        return tag("div", (tag("h3", escape(heading)) if heading else "") + tag("div", "", id=name), class_="figure")


def table_markup(header: Sequence[str], lines: Sequence[str], **attributes: str) -> str:
    """A table whose lines are rows already."""
    head = tag("thead", tag("tr", "".join(tag("th", escape(name)) for name in header)))
    return tag("table", head + tag("tbody", "".join(lines)), **attributes)


def build(view: View) -> str:
    """The page of a sweep as its folder is now."""
    sweep, page = view.sweep, Page()
    table, _ = told_settings(view)
    hues = colours(summaries(view), sweep.objective)
    page.add(tag("h1", escape(f"{sweep.name} ({sweep.scale.name})")), tag("p", escape(sweep.question)))
    _answer(page, view)
    _results(page, view, table, hues)
    _costs(page, view, table, hues)
    _search(page, view)
    trials = _trials(page, view, hues)
    _failures(page, view)
    _what_was_run(page, view)
    values = {"figures": page.figures, "trials": trials, "curve_layout": _curve_layout()}
    return string.Template((_PAGE / "report.html").read_text()).substitute(
        title=escape(f"{sweep.name} ({sweep.scale.name})"),
        style=(_PAGE / "report.css").read_text(),
        body="\n".join(page.body),
        data=_as_data(values),
        plotly=_in_script(get_plotlyjs()),
        script=(_PAGE / "report.js").read_text(),
    )


def write(view: View) -> Path:
    """Make report.html anew; returns its path."""
    path = view.sweep.path / "report.html"
    write_atomic(path, build(view))
    return path


def _in_script(code: str) -> str:
    """A script that cannot end the element it stands in; within its strings and patterns the backslash means nothing."""
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _as_data(values: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(values, allow_nan=False).replace("<", "\\u003c")


def _curve_layout() -> Any:
    import plotly.graph_objects as go

    return json.loads(layout(go.Figure(), 380).to_json())["layout"]


def _answer(page: Page, view: View) -> None:
    sentence, separable = html_text.answer(view)
    lines = [tag("p", escape(sentence[0].upper() + sentence[1:]))]
    lines += [tag("p", escape(line), class_="soft") for line in html_text.beside_the_answer(view)]
    page.add(tag("div", "".join(lines), id="answer", class_="answer separable" if separable else "answer"))
    tiles = [tag("div", tag("b", escape(value)) + tag("span", escape(what)), class_="tile") for value, what in html_text.tiles(view)]
    page.add(tag("div", "".join(tiles), class_="tiles"))
    warned = {t.signature: [w.line for w in found] for t in view.sweep.trials if (found := warnings.warnings_of(view, t))}
    if warned:
        button = tag("button", f"select {len(warned)}", type="button", data_select=",".join(warned))
        page.add(tag("h3", f"Warnings {button}"), items(warnings.told(view.sweep, warned)))


def _results(page: Page, view: View, table: Sequence[Summary], hues: Mapping[str, str]) -> None:
    page.add(tag("h2", "Settings"))
    shown = [m for m in columns(view) if any(s.values.get(m) for s in table)]
    scores = [m for m in shown if not m.endswith("top5")]
    figures = [page.figure(f"scores-{i}", scores_figure(view, table, m, hues), title(m)) for i, m in enumerate(scores)]
    paper = "; hollow diamonds: the paper's value, one seed" if view.sweep.paper else ""
    said = f"squares or line: mean ± standard deviation over seeds; dots: single seeds{paper}"
    page.add(tag("div", "".join(figures), class_="figures"), tag("p", escape(said), class_="soft"))
    found = peoples_table(view)
    lines = []
    for cells, words in zip(found.lines, found.in_words(), strict=True):
        told = (tag("b", escape(text)) if cell.bold else escape(text) for cell, text in zip(cells, words, strict=True))
        lines.append(tag("tr", "".join(tag("td", text) for text in told)))
    page.add(tag("div", table_markup(found.header, lines, id="results"), class_="scroll"))
    rule = "a run counts once it has completed; a probe that failed has no value and counts in no mean of its own"
    page.add(*(tag("p", escape(note), class_="soft") for note in [*found.notes, f"rule: {rule}"]))


def _costs(page: Page, view: View, table: Sequence[Summary], hues: Mapping[str, str]) -> None:
    hours, unit = html_text.hours_of_a_run(view), html_text.hours_unit(view)
    page.add(tag("h2", "Cost"), items([*html_text.costs(view), *advice_lines(view)]))
    done = [s for s in table if s.spreads[view.sweep.objective].n]
    if done:
        figure = costs_figure(done, view.sweep.objective, hours, unit, hues)
        page.add(page.figure("costs", figure), tag("p", "dotted: no other setting is both better and cheaper", class_="soft"))


def _search(page: Page, view: View) -> None:
    if view.sweep.search is None:
        return
    from sweeps.report.search_figures import search_figures

    page.add(tag("h2", "Search"))
    figures = search_figures(view)
    if not figures:
        page.add(tag("p", "Too few runs have completed for a figure of the search."))
    for i, (heading, figure) in enumerate(figures):
        page.add(page.figure(f"search-{i}", figure, heading))


def _trials(page: Page, view: View, hues: Mapping[str, str]) -> list[dict[str, Any]]:
    """The section of all trials; returns what the script must know of each."""
    table, sweep = rows(view), view.sweep
    curves = {t.signature: curves_of(view, t) for t in sweep.trials}
    names = list(dict.fromkeys([*_CURVES, *(key for found in curves.values() for key in found)]))
    names = [n for n in names if any(n in found for found in curves.values())]
    choices = "".join(tag("option", escape(html_text.curve_title(n)), value=n) for n in names)
    page.add(tag("h2", "Trials"))
    controls = tag("label", "curve " + tag("select", choices, id="metric")) if names else tag("select", "", id="metric", hidden="hidden")
    controls += tag("input", "", id="filter", type="search", placeholder="filter trials", aria_label="filter trials")
    controls += tag("button", "clear selection", id="clear", type="button") + tag("span", "", id="chosen", class_="soft")
    page.add(tag("div", controls, class_="controls"), tag("div", tag("div", "", id="curves") if names else "", class_="figure"))
    page.add(tag("div", "", id="details"))
    metrics = columns(view)
    unit = html_text.hours_unit(view)  # asked once: it looks at every trial
    header = ["setting", "seed", "state", *map(title, metrics), unit, "starts"]
    lines = [_trial_line(view, trial, row, metrics) for trial, row in zip(sweep.trials, table, strict=True)]
    page.add(tag("div", table_markup(header, lines, id="trials"), class_="scroll tall"))
    return [
        {
            "signature": t.signature,
            "name": f"{t.setting}, seed {t.seed}",
            "colour": hues.get(t.setting, "#888"),
            "curves": {n: _points(c) for n, c in curves[t.signature].items()},
            "about": html_text.about(view, t, unit),
            "log": html_text.last_lines(view, t) if row.cause else "",
        }
        for t, row in zip(sweep.trials, table, strict=True)
    ]


def _points(curve: Curve) -> list[list[float]]:
    return [[float(f"{x:.5g}") for x in curve.epochs], [float(f"{y:.5g}") for y in curve.values]]


def _trial_line(view: View, trial: Trial, row: Row, metrics: Sequence[str]) -> str:
    scores = [f"{row.metrics[m]:.2f}" if m in row.metrics else "-" for m in metrics]
    hours = view.device_hours(trial)
    told = [str(row.seed), row.state.name, *scores, f"{hours:.3g}" if hours else "-", str(len(view.claims(trial)) or "-")]
    cells = [tag("td", escape(row.setting))]
    cells += [tag("td", escape(text), **({"class_": "failed"} if text == "failed" else {})) for text in told]
    return tag("tr", "".join(cells), data_trial=row.signature, tabindex="0")


def _failures(page: Page, view: View) -> None:
    groups = html_text.failures(view)
    page.add(tag("h2", "Failures"))
    if not groups:
        page.add(tag("p", "No run has failed, and every probe has a value."))
    for group in groups:
        signatures = ",".join(t.signature for t in group.trials)
        button = tag("button", f"select {len(group.trials)}", type="button", data_select=signatures)
        page.add(tag("h3", f"{len(group.trials)} of {escape(group.cause)} {button}"))
        page.add(items([f"{t.setting}, seed {t.seed}" for t in group.trials]))
        if group.log:
            page.add(tag("pre", escape(group.log)))


def _what_was_run(page: Page, view: View) -> None:
    page.add(tag("h2", "What was run"), tag("p", escape(run_set(view)), class_="soft"), items(html_text.what_was_run(view)))
    page.add(tag("p", escape(f"python -m sweeps report {view.sweep.path.name} makes this page anew from the run folders."), class_="soft"))
