"""Add to a figure of scores what they are compared with: chance level, the baseline, and the score of the best."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from jobs.task import score_format
from sweeps.report.aggregate import Leader, Spread, Summary, in_units
from sweeps.report.best import is_estimated, score_of_best
from sweeps.report.html_text import called
from sweeps.report.seen import Seen

_MOST_REFERENCES = 3  # with a line each
_FARTHEST = 3.0  # an axis with a line on it is at most so many times as long as one of the scores alone
_DASHES = ("dot", "dashdot", "longdash")


def add_lines(figure: go.Figure, seen: Seen, table: Sequence[Summary], metric: str) -> go.Figure:
    """Draw the references and the baseline of `metric` as lines across the axis of scores, and the score of the best."""
    upright = figure.layout.yaxis.type == "category"  # scores are on the horizontal axis
    own = [value for s in table for value in s.values.get(metric, {}).values()]
    lines = [*_references(seen, metric), *_baseline(seen, metric)]
    near: list[tuple[str, float, str]] = []
    far: list[tuple[str, float, str]] = []
    for name, value, dash in lines:
        (near if _is_near(value, own) else far).append((name, value, dash))
    figure.update_traces(showlegend=False)
    for name, value, dash in near:
        ends = {"x0": value, "x1": value, "y0": 0, "y1": 1, "yref": "paper"}
        ends = ends if upright else {"y0": value, "y1": value, "x0": 0, "x1": 1, "xref": "paper"}
        line = {"color": "#1c1c1e", "dash": dash, "width": 1.3}
        figure.add_shape(type="line", line=line, name=name, showlegend=True, layer="below", **ends)
    include = {"autorangeoptions": {"include": [value for _, value, _ in near]}} if near else {}
    figure.update_xaxes(**include) if upright else figure.update_yaxes(**include)
    if seen.lead is not None and metric == seen.lead.metric:
        _add_best(figure, seen, seen.lead, table, upright)
    entries = len(near) + (figure.data[-1].showlegend is True)
    if entries:
        legend = {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "xanchor": "left", "font": {"size": 11}}
        figure.update_layout(showlegend=True, legend=legend, height=figure.layout.height + 20 * entries)
    if far:
        said = ", ".join(f"{name} at {in_units(seen.view, f'{value:{_form(seen)}}')}" for name, value, _ in far)
        figure.update_layout(meta=f"outside the axis: {said}")
    return figure


def _form(seen: Seen) -> str:
    return score_format(seen.view.sweep.task.UNIT, 1)


def _is_near(value: float, own: Sequence[float]) -> bool:
    """Return whether a line at `value` leaves enough of the axis for the scores."""
    span = max(own) - min(own)
    return not span or max(*own, value) - min(*own, value) <= _FARTHEST * span


def _references(seen: Seen, metric: str) -> list[tuple[str, float, str]]:
    """Return name, score and dash of what the scores are compared with, chance level among them."""
    found: Mapping[str, Mapping[str, Spread]] = {name: scores for name, scores in seen.references.items() if metric in scores}
    # Where encoders differ, each has a random one of its own: those are in the table.
    names = list(found) if len(found) <= _MOST_REFERENCES else [name for name in found if not name.endswith(")")][:_MOST_REFERENCES]
    known = [(name, found[name][metric].mean) for name in names]
    return [(name, mean, _DASHES[i]) for i, (name, mean) in enumerate(known) if mean is not None]


def _baseline(seen: Seen, metric: str) -> list[tuple[str, float, str]]:
    """Return the mean of the configuration that all are compared with: the first, which in a search is that without changes."""
    first = seen.view.sweep.trials[0].configuration
    base = next((s for s in seen.table if s.key == first), None)
    mean = None if base is None or metric not in base.spreads else base.spreads[metric].mean
    if base is None or mean is None or sum(bool(s.values.get(metric)) for s in seen.table) < 2:
        return []
    name = "baseline" if seen.view.sweep.search is not None else f"first configuration, {called(base.label)}"
    return [(name, mean, "dash")]


def _add_best(figure: go.Figure, seen: Seen, lead: Leader, table: Sequence[Summary], upright: bool) -> None:
    """Draw the score of the best and its interval, in the place of its configuration."""
    found = lead.winner
    place = next((i for i, s in enumerate(table) if s.key == lead.best.key), None)
    if not is_estimated(lead) or place is None or found.estimate is None:
        return
    along, across = ("x", "y") if upright else ("y", "x")
    # The traces of a figure with an axis of numbers go by that axis; of the others by the table.
    if upright:
        where = figure.layout.yaxis.categoryarray[::-1][place]
    else:
        means = [s.spreads[lead.metric].mean for s in table]
        where = figure.data[0].x[list(figure.data[0].y).index(means[place])]
    bar = {}
    if found.low is not None and found.high is not None:
        low, high = found.estimate - found.low, found.high - found.estimate
        bar = {f"error_{along}": {"type": "data", "array": [high], "arrayminus": [low], "color": "#1c1c1e", "thickness": 1, "width": 7}}
    figure.add_scatter(
        **{along: [found.estimate], across: [where]},
        **bar,
        mode="markers",
        marker={"color": "#1c1c1e", "size": 13, "symbol": "circle-open", "line": {"width": 1.5}},
        name="score of the best, 95 % interval",
        showlegend=True,
        hovertemplate=f"score of the best, by seeds that did not select it<br>{score_of_best(seen.view, lead)}<extra></extra>",
    )
