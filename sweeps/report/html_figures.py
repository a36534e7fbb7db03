"""Build the Plotly figures of a report for the page's script."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from cnnjepa.run.identity import lookup
from jobs.task import score_format
from sweeps.report.aggregate import Spread, Summary, distinct, in_units, title
from sweeps.report.html_names import placed, span
from sweeps.report.html_text import called
from sweeps.state.view import View

_LABEL_WIDTH = 29  # characters per line of an axis label; on a phone the axis needs room too
_MOST_DRAWN = 40  # configurations with a line of their own in a figure
# Each has a contrast of 3 to white, which WCAG asks of graphics at level AA.
PALETTE = ("#1f5fa8", "#b4531a", "#2f7d32", "#6a4c93", "#b3261e", "#00798c", "#8a6d00", "#b8327a", "#5b5f66", "#1c1c1e")
SCALE = ("#1b2a7a", "#1f6fb0", "#0f7d74", "#4f7d1c", "#9a6a00", "#b4461a", "#8c1230")  # from the best to the worst
_FONT = {"family": "system-ui, sans-serif", "size": 12, "color": "#222"}


def layout(figure: go.Figure, height: int) -> go.Figure:
    """Give all figures, Optuna's included, the same look. The page sets their width."""
    figure.update_layout(
        template="plotly_white",
        font=_FONT,
        height=height,
        width=None,
        autosize=True,
        margin={"l": 10, "r": 12, "t": 12, "b": 44},
        title=None,
        hoverlabel={"align": "left"},
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def colours(table: Sequence[Summary]) -> dict[str, str]:
    """Return configuration -> colour; `table` has the best one first.

    If there are too many configurations to tell apart, colours follow a scale from best to worst.
    """
    if len(table) <= len(PALETTE):
        return {s.key: PALETTE[i] for i, s in enumerate(table)}
    shares = [i / (len(table) - 1) for i in range(len(table))]
    return dict(zip((s.key for s in table), sample_colorscale(SCALE, shares), strict=True))


def short(label: str) -> str:
    """Return a configuration's axis label; for a search, only its number."""
    return "<br>".join(textwrap.wrap(called(label), _LABEL_WIDTH))


def numeric_axis(view: View) -> str | None:
    """Return the only key in which the configurations differ, if its values are numbers.

    A key that only some have, such as one of a method, counts as a difference. A bool is no number.
    """
    values = {t.configuration: leaves(t.values) for t in view.sweep.trials}
    if len(values) < 3:
        return None
    keys = dict.fromkeys(key for leaves in values.values() for key in leaves if key != "seed")
    differing = [k for k in keys if len({repr(leaves[k]) if k in leaves else None for leaves in values.values()}) > 1]
    if len(differing) != 1:
        return None
    numbers = [leaves.get(differing[0]) for leaves in values.values()]
    return differing[0] if all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers) else None


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key -> value for every value that is not a dict."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def drawn(table: Sequence[Summary], view: View) -> tuple[list[Summary], str]:
    """Return the configurations that figures of scores show, the best ones, and a line about the others.

    On an axis of numbers there is room for all.
    """
    if len(table) <= _MOST_DRAWN or numeric_axis(view) is not None:
        return list(table), ""
    rest = f"the {_MOST_DRAWN} best of {len(table):,} configurations are drawn; summary.csv has all"
    return list(table[:_MOST_DRAWN]), rest


def scores_figure(view: View, table: Sequence[Summary], metric: str, hues: Mapping[str, str]) -> go.Figure:
    """Plot each mean ± standard deviation. Dots are seeds; a diamond is the paper's value."""
    key = numeric_axis(view)
    if key is not None:
        return _line(view, table, metric, key)
    figure, form = go.Figure(), score_format(view.sweep.task.UNIT)
    names = distinct([short(s.label) for s in table])
    # One trace of each kind, however many configurations there are: a browser draws hundreds of traces slowly.
    of_seeds = [(value, name, s, seed) for s, name in zip(table, names, strict=True) for seed, value in s.values.get(metric, {}).items()]
    figure.add_scatter(
        x=[value for value, _, _, _ in of_seeds],
        y=[name for _, name, _, _ in of_seeds],
        mode="markers",
        marker={"color": [hues[s.key] for _, _, s, _ in of_seeds], "size": 7, "opacity": 0.5},
        hovertemplate=[f"{s.label}<br>seed {seed}: %{{x:{form}}}<extra></extra>" for _, _, s, seed in of_seeds],
    )
    of_means = [(s.spreads[metric], name, s) for s, name in zip(table, names, strict=True) if s.spreads[metric].mean is not None]
    # Bars of a trace have one colour; None draws none.
    bars = {"type": "data", "array": [spread.std for spread, _, _ in of_means], "thickness": 1.5, "color": "#555"}
    figure.add_scatter(
        x=[spread.mean for spread, _, _ in of_means],
        y=[name for _, name, _ in of_means],
        error_x={**bars, "visible": any(spread.std is not None for spread, _, _ in of_means)},
        mode="markers",
        marker={"color": [hues[s.key] for _, _, s in of_means], "size": 11, "symbol": "square"},
        hovertemplate=[f"{s.label}<br>{spread} (n = {spread.n})<extra></extra>" for spread, _, s in of_means],
    )
    papers = [(s, name) for s, name in zip(table, names, strict=True) if metric in s.paper]
    if papers:
        figure.add_scatter(
            x=[s.paper[metric] for s, _ in papers],
            y=[name for _, name in papers],
            mode="markers",
            marker={"color": "#000", "size": 11, "symbol": "diamond-open"},
            hovertemplate=[f"{s.label}<br>paper: {s.paper[metric]:{form}}, one seed<extra></extra>" for s, _ in papers],
        )
    figure.update_layout(showlegend=False)
    # The range keeps the rows of configurations without a score, which lie at its end, off the axis.
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], type="category", range=[-0.6, len(names) - 0.4])
    figure.update_xaxes(title=in_units(view, title(view, metric), "{}, {}"))
    return layout(figure, 90 + sum(22 + 15 * name.count("<br>") for name in names))


def _line(view: View, table: Sequence[Summary], metric: str, key: str) -> go.Figure:
    values = {t.configuration: float(str(lookup(t.values, key))) for t in view.sweep.trials}
    ranked = sorted((s for s in table if s.spreads[metric].mean is not None), key=lambda s: values[s.key])
    xs, means = [values[s.key] for s in ranked], [s.spreads[metric] for s in ranked]
    figure, form = go.Figure(), score_format(view.sweep.task.UNIT)
    bars = {"type": "data", "array": [m.std or 0.0 for m in means], "thickness": 2}
    hover = [f"{s.label}<br>{m} (n = {m.n})<extra></extra>" for s, m in zip(ranked, means, strict=True)]
    line = {"color": PALETTE[0]}
    figure.add_scatter(x=xs, y=[m.mean for m in means], error_y=bars, mode="lines+markers", line=line, hovertemplate=hover)
    dots = [(values[s.key], v) for s in ranked for v in s.values.get(metric, {}).values()]
    marker = {"color": PALETTE[0], "opacity": 0.5}
    hover_text = f"%{{y:{form}}}<extra></extra>"
    figure.add_scatter(x=[x for x, _ in dots], y=[y for _, y in dots], mode="markers", marker=marker, hovertemplate=hover_text)
    papers = [s for s in table if metric in s.paper]
    marker = {"color": "#000", "size": 11, "symbol": "diamond-open"}
    hover_text = f"paper: %{{y:{form}}}, one seed<extra></extra>"
    ys = [s.paper[metric] for s in papers]
    figure.add_scatter(x=[values[s.key] for s in papers], y=ys, mode="markers", marker=marker, hovertemplate=hover_text)
    figure.update_layout(showlegend=False)
    if min(xs, default=0.0) > 0 and max(xs) / min(xs) > 30:
        figure.update_xaxes(type="log")
    figure.update_xaxes(title=key)
    figure.update_yaxes(title=in_units(view, title(view, metric), "{}, {}"))
    return layout(figure, 340)


def pareto(points: Mapping[str, tuple[float, float]], sign: float = 1.0) -> list[str]:
    """Return the names on the Pareto front of (cost, score), cheapest first; with sign -1 a lower score is better."""
    front: list[str] = []
    best = float("-inf")
    for name, (_, score) in sorted(points.items(), key=lambda item: (item[1][0], -sign * item[1][1])):
        if sign * score > best:
            front.append(name)
            best = sign * score
    return front


def costs_figure(view: View, table: Sequence[Summary], hours: Mapping[str, Spread], unit: str, hues: Mapping[str, str]) -> go.Figure:
    """Plot score against hours of a run, means ± standard deviation, with the Pareto front."""
    figure, metric = go.Figure(), view.sweep.objective
    known = [(s, hours[s.key], s.spreads[metric]) for s in table if hours[s.key].mean is not None and s.spreads[metric].mean is not None]
    points = {s.key: (x.mean or 0.0, y.mean or 0.0) for s, x, y in known}
    bars: dict[str, Any] = {"type": "data", "thickness": 1}
    # One trace, however many configurations there are: a browser draws thousands of traces slowly.
    figure.add_scatter(
        x=[x.mean for _, x, _ in known],
        y=[y.mean for _, _, y in known],
        error_x={**bars, "array": [x.std or 0.0 for _, x, _ in known], "visible": any(x.std for _, x, _ in known)},
        error_y={**bars, "array": [y.std or 0.0 for _, _, y in known], "visible": any(y.std for _, _, y in known)},
        mode="markers",
        marker={"color": [hues[s.key] for s, _, _ in known], "size": 10 if len(known) <= _MOST_DRAWN else 6},
        hovertemplate=[f"{s.label}<br>{in_units(view, y)} (n = {y.n})<br>{x.in_digits()} {unit} a run<extra></extra>" for s, x, y in known],
    )
    best, labels = pareto(points, view.sweep.sign), {s.key: s.label for s in table}
    front = [points[name] for name in best]
    line = {"color": "#6b7280", "dash": "dot", "shape": "hv"}
    figure.add_scatter(x=[x for x, _ in front], y=[y for _, y in front], mode="lines", line=line, hoverinfo="skip")
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title=f"{unit} of a run")
    figure.update_yaxes(title=in_units(view, title(view, metric), "{}, {}"))
    said = "dotted: no other configuration is both better and cheaper"
    if points:
        right = 1.08 * max((x.mean or 0.0) + (x.std or 0.0) for _, x, _ in known) or 1.0
        ends = [(y.mean or 0.0) + sign * (y.std or 0.0) for _, _, y in known for sign in (-1, 1)]
        axes = (0.0, right, *span(ends, 0.1))
        crowd = list(points.values()) if len(points) <= _MOST_DRAWN else front
        names = placed({n: points[n] for n in reversed(best)}, {n: short(labels[n]) for n in best}, axes, crowd)
        figure.update_layout(annotations=names)
        figure.update_xaxes(range=axes[:2])
        figure.update_yaxes(range=axes[2:])
        said += f"; {len(best) - len(names)} of its {len(best)} names have no room: point at them" if len(names) < len(best) else ""
    return layout(figure, 360).update_layout(meta=said)
