"""Plot the table as ablation.png and accuracy_against_cost.png, for slides or a README."""

import io
import itertools
import textwrap
from pathlib import Path
from typing import Any

from cnnjepa.run.files import write_atomic
from sweeps.report.aggregate import LABEL_WIDTH, in_units, shown_configurations, title
from sweeps.state.view import View

MOST_DRAWN = 40  # configurations of a picture, which is then at most some 4,000 pixels high
MOST_NAMED = 30  # in a picture of costs, where names would cover each other


def draw(view: View, path: Path) -> None:
    """Plot each mean ± standard deviation. Dots are seeds; a diamond is the paper's value."""
    from matplotlib.figure import Figure

    sweep, whole = view.sweep, shown_configurations(view)[0]
    table = whole[:MOST_DRAWN]
    shown = sweep.headline or [sweep.objective]
    height = 1.4 + 0.36 * sum(-(-len(s.label) // LABEL_WIDTH) for s in table)
    figure = Figure(figsize=(5.2 * len(shown), height))
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)
    for axis, metric, color in zip(axes[0], shown, itertools.cycle(("#1f5fa8", "#b4531a", "#3c7d3c", "#6a4c93")), strict=False):
        for y, summary in enumerate(table):
            spread = summary.spreads[metric]
            seeds = list(summary.values.get(metric, {}).values())
            axis.plot(seeds, [y] * len(seeds), "o", color=color, alpha=0.35, markersize=4)
            if spread.mean is not None:
                axis.errorbar(spread.mean, y, xerr=spread.std, fmt="s", color=color, capsize=3, markersize=5)
            if metric in summary.paper:
                axis.plot(summary.paper[metric], y, "D", markerfacecolor="none", color="black", markersize=6)
        axis.set_xlabel(in_units(view, title(view, metric), "{} ({})"))
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(table)), [textwrap.fill(s.label, LABEL_WIDTH) for s in table], fontsize=8)
    axes[0][0].invert_yaxis()
    counts = sorted({s.spreads[sweep.objective].n for s in table})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    note = "; hollow diamonds: the paper's value, one seed" if sweep.paper else ""
    ranked = f"ranked by {title(view, sweep.objective)}"
    rest = f"\nthe {len(table)} best of {len(whole):,} configurations; summary.csv has all" if len(table) < len(whole) else ""
    figure.suptitle(f"{sweep.name} ({sweep.scale.name}): mean ± std over seeds, {n}, {ranked}{note}{rest}", fontsize=9)
    _write_figure(figure, path)


def _write_figure(figure: Any, path: Path) -> None:
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, dpi=130, metadata={"Software": None})
    write_atomic(path, data.getvalue())


def draw_costs(view: View, path: Path) -> None:
    """Plot metrics against the first cost: mean ± std. Hollow diamonds are the paper's values."""
    from matplotlib.figure import Figure

    sweep, table = view.sweep, shown_configurations(view)[0]
    cost = sweep.costs[0]
    shown = [m for m in sweep.headline if sweep.task.is_pictured(m)] or [sweep.objective]
    figure = Figure(figsize=(5.6 * len(shown), 4.4))
    axes = figure.subplots(1, len(shown), squeeze=False)
    for axis, metric in zip(axes[0], shown, strict=True):
        for i, summary in enumerate(table):
            color, x, y = f"C{i}", summary.costs[cost], summary.spreads[metric]
            if x.mean is not None and y.mean is not None:
                axis.errorbar(x.mean, y.mean, xerr=x.std, yerr=y.std, fmt="o", color=color, capsize=3)
                if i < MOST_NAMED:
                    axis.annotate(summary.label, (x.mean, y.mean), xytext=(6, 5), textcoords="offset points", fontsize=8, color=color)
            if metric in summary.paper and cost in summary.paper:
                star = "*" if summary.label in sweep.best_of_many else ""
                point = summary.paper[cost], summary.paper[metric]
                axis.plot(*point, "D", markerfacecolor="none", color=color)
                label = f"{summary.label}, paper{star}"
                axis.annotate(label, point, xytext=(6, -10), textcoords="offset points", fontsize=7, color=color)
        axis.set_xlabel(title(view, cost))
        axis.set_ylabel(in_units(view, title(view, metric), "{} ({})"))
        axis.margins(x=0.25)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    note = "; hollow diamonds: the paper's values, one seed" if sweep.paper else ""
    note += f"; the {MOST_NAMED} best are named" if len(table) > MOST_NAMED else ""
    note += ", * each the best of several runs" if sweep.best_of_many else ""
    figure.suptitle(f"{sweep.name} ({sweep.scale.name}): mean ± std over seeds{note}", fontsize=9)
    _write_figure(figure, path)
