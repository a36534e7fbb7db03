"""results.csv, summary.csv, the table on the terminal and ablation.png: views of the run folders, rebuilt at will."""

import csv
import io
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from cnnjepa.files import write_atomic
from cnnjepa.runs import RunResult, RunStatus
from sweeps.folder import TrialState, View

_LABEL_WIDTH = 60  # characters of a setting's name in a line of a table or picture
COSTS = ("seconds", "device_hours", "images_per_second", "peak_memory_mb", "parameters", "resumes", "pretraining_hours", "energy_kwh")
_COST_TITLES = {
    "pretraining_hours": "pretraining, device-hours",
    "images_per_second": "images/s",
    "energy_kwh": "energy with probes, kWh",
    "peak_memory_mb": "peak memory, MiB",
}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of n numbers; std is None for fewer than two, mean for none."""

    mean: float | None
    std: float | None
    n: int

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """The spread of `values`."""
        mean = statistics.fmean(values) if values else None
        return Spread(mean, statistics.stdev(values) if len(values) > 1 else None, len(values))

    def in_digits(self) -> str:
        """As `str`, in three significant digits, and from 100 on in whole numbers: for what is not a percentage."""

        def told(value: float, digits: int) -> str:
            return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"

        if self.mean is None:
            return "-"
        return told(self.mean, 3) if self.std is None else f"{told(self.mean, 3)} ± {told(self.std, 2)}"

    def __str__(self) -> str:
        """'73.1 ± 0.4', '73.1' for a single value, a dash for none."""
        if self.mean is None:
            return "-"
        return f"{self.mean:.1f}" if self.std is None else f"{self.mean:.1f} ± {self.std:.1f}"


@dataclass(frozen=True)
class Row:
    """One run: its trial, where it stands, its metrics and costs."""

    signature: str
    setting: str
    seed: int
    state: TrialState
    cause: str
    metrics: dict[str, float]
    costs: dict[str, float]


@dataclass(frozen=True)
class Summary:
    """One setting over its completed seeds; counts of the runs that are not in the means."""

    setting: str
    spreads: dict[str, Spread]
    failed: int
    pruned: int
    unfinished: int
    parameters: int
    device_hours: float
    paper: dict[str, float]
    costs: dict[str, Spread]  # of the completed runs


def costs_of(result: RunResult, global_batch_size: int) -> dict[str, float]:
    """What a run cost, by the names in COSTS, less what is not known of it. Pretraining is device_hours without the probes' share."""
    costs = {name: getattr(result, name) for name in COSTS if name != "pretraining_hours"}
    if result.status is RunStatus.completed:  # at no images a second nothing was trained
        training_seconds = result.step * global_batch_size / result.images_per_second if result.images_per_second else 0.0
        costs["pretraining_hours"] = result.device_hours * training_seconds / max(result.seconds, 1e-9)
    return {name: value for name, value in costs.items() if value is not None}


def rows(view: View) -> list[Row]:
    """One row a trial, in the sweep's order."""
    table = []
    for trial in view.sweep.trials:
        result = view.result(trial)
        causes = [] if result is None else [result.cause, *(f"{p}: {c}" for p, c in result.missing.items())]
        table.append(
            Row(
                trial.signature,
                trial.setting,
                trial.seed,
                view.state(trial),
                "; ".join(c for c in causes if c),
                {} if result is None else result.metrics,
                {} if result is None else costs_of(result, trial.values["global_batch_size"]),
            )
        )
    return table


def summaries(view: View) -> list[Summary]:
    """One summary a setting, the best mean objective first, those without one last."""
    table, sweep = rows(view), view.sweep
    metrics = sorted({m for row in table for m in row.metrics} | {sweep.objective, *sweep.headline})
    found = []
    for setting in dict.fromkeys(row.setting for row in table):
        mine = [row for row in table if row.setting == setting]
        done = [row for row in mine if row.state is TrialState.completed]
        found.append(
            Summary(
                setting,
                {m: Spread.of([row.metrics[m] for row in done if m in row.metrics]) for m in metrics},
                sum(row.state is TrialState.failed for row in mine),
                sum(row.state is TrialState.pruned for row in mine),
                sum(not row.state.ended for row in mine),
                max((int(row.costs["parameters"]) for row in done), default=0),
                sum(row.costs["device_hours"] for row in mine if row.costs),
                sweep.paper.get(setting, {}),
                {c: Spread.of([row.costs[c] for row in done if c in row.costs]) for c in COSTS},
            )
        )
    last = float("-inf")
    return sorted(found, key=lambda s: -(last if s.spreads[sweep.objective].mean is None else s.spreads[sweep.objective].mean or 0.0))


def _csv(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if v is None else v for v in line] for line in lines])
    return out.getvalue()


def told_settings(view: View) -> tuple[list[Summary], str]:
    """The settings that a table or picture for people shows, and a line about those that it leaves out: all of whose runs were pruned.

    Where that is so of every setting, none is left out.
    """
    table = summaries(view)
    shown = [s for s in table if not s.pruned or s.failed or s.unfinished or any(spread.n for spread in s.spreads.values())] or table
    left_out = len(table) - len(shown)
    return shown, f"{left_out} settings were pruned on their way, see summary.csv" if left_out else ""


def results_csv(view: View) -> str:
    """One line a run; what a run does not have is empty."""
    table = rows(view)
    metrics = sorted({m for row in table for m in row.metrics})
    header = ["signature", "setting", "seed", "state", *metrics, *COSTS, "cause"]
    return _csv(
        header,
        [
            [r.signature, r.setting, r.seed, r.state.name, *(r.metrics.get(m) for m in metrics), *(r.costs.get(c) for c in COSTS), r.cause]
            for r in table
        ],
    )


def summary_csv(view: View) -> str:
    """One line a setting, best first: mean, std and n of every metric, and the paper's value where the scale may be held against it."""
    table = summaries(view)
    metrics = list(table[0].spreads) if table else []
    papers = sorted({m for s in table for m in s.paper})
    told = [*metrics, *view.sweep.costs]
    header = ["setting", *(f"{m}_{part}" for m in told for part in ("mean", "std", "n")), *(f"{m}_paper" for m in papers)]
    lines = []
    for s in table:
        spread = [v for m in told for v in vars({**s.spreads, **s.costs}[m]).values()]
        lines.append(
            [s.setting, *spread, *(s.paper.get(m) for m in papers), s.failed, s.pruned, s.unfinished, s.parameters, s.device_hours]
        )
    return _csv([*header, "failed", "pruned", "unfinished", "parameters", "device_hours"], lines)


def _columns(view: View) -> list[str]:
    return list(dict.fromkeys([view.sweep.objective, *view.sweep.headline]))


def title(metric: str) -> str:
    """'linear top-1, test' for 'linear.test_top1'; a cost's name and unit."""
    if metric in COSTS:
        return _COST_TITLES.get(metric, metric)
    probe, _, rest = metric.partition(".")
    part, _, score = rest.rpartition("_")
    where = {"holdout": "held-out", "paper_protocol": "test, best epoch"}.get(part, part)
    return f"{'k-NN' if probe == 'knn' else probe} {score.replace('top', 'top-')}, {where}"


def _note(view: View) -> str:
    """What a reader of the table must know beside it."""
    star = "* each score the best of several runs" if view.sweep.best_of_many else ""
    return "; ".join(t for t in (told_settings(view)[1], star) if t)


def cells(view: View) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table that people read: mean ± std over seeds (n), ranked by the objective."""
    metrics, costs = _columns(view), view.sweep.costs
    table, _ = told_settings(view)
    papers = [m for m in [*view.sweep.headline, *costs] if any(m in s.paper for s in table)]
    # Of a sweep that asks about costs the total would be one number too many.
    total = [] if costs else ["device-hours"]
    header = [
        "setting",
        *(title(m) for m in metrics),
        *(f"paper: {title(m)}" for m in papers),
        "n",
        *map(title, costs),
        "parameters",
        *total,
    ]
    lines = []
    for s in table:
        marks = (
            [f"{s.failed} failed"] * bool(s.failed)
            + [f"{s.pruned} pruned"] * bool(s.pruned)
            + [f"{s.unfinished} to come"] * bool(s.unfinished)
        )
        n = str(s.spreads[view.sweep.objective].n) + (f" ({', '.join(marks)})" if marks else "")
        star = "*" if s.setting in view.sweep.best_of_many else ""
        paper = [f"{s.paper[m]:.2f}{star if m not in costs else ''}" if m in s.paper else "-" for m in papers]
        spent = [s.costs[c].in_digits() for c in costs]
        hours = [] if costs else [f"{s.device_hours:.3g}"]
        lines.append([s.setting, *(str(s.spreads[m]) for m in metrics), *paper, n, *spent, f"{s.parameters:,}", *hours])
    return header, lines


def terminal_table(view: View) -> Table:
    """The table for a terminal."""
    header, lines = cells(view)
    heading = f"{view.sweep.name} ({view.sweep.scale.name}): mean ± std over seeds, best first"
    table = Table(title=heading, caption=_note(view) or None)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", max_width=None if i else _LABEL_WIDTH)
    for line in lines:
        table.add_row(*line)
    return table


def markdown_table(view: View) -> str:
    """The same table in Markdown."""
    header, lines = cells(view)
    rule = ["---", *["---:"] * (len(header) - 1)]
    said = _note(view)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines]) + "\n" + (f"\n{said}\n" if said else "")


def draw(view: View, path: Path) -> None:
    """Write the picture: each setting's mean with its standard deviation, each seed as a dot, the paper's value as a diamond."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sweep, table, runs = view.sweep, told_settings(view)[0], rows(view)
    figure, axes = pyplot.subplots(
        1,
        len(sweep.headline),
        figsize=(5.2 * len(sweep.headline), 1.4 + 0.36 * sum(-(-len(s.setting) // _LABEL_WIDTH) for s in table)),
        sharey=True,
        squeeze=False,
    )
    for axis, metric, color in zip(axes[0], sweep.headline, ("#1f5fa8", "#b4531a", "#3c7d3c", "#6a4c93"), strict=False):
        for y, summary in enumerate(table):
            spread = summary.spreads[metric]
            seeds = [r.metrics[metric] for r in runs if r.setting == summary.setting and metric in r.metrics]
            axis.plot(seeds, [y] * len(seeds), "o", color=color, alpha=0.35, markersize=4)
            if spread.mean is not None:
                axis.errorbar(spread.mean, y, xerr=spread.std, fmt="s", color=color, capsize=3, markersize=5)
            if metric in summary.paper:
                axis.plot(summary.paper[metric], y, "D", markerfacecolor="none", color="black", markersize=6)
        axis.set_xlabel(f"{title(metric)} (%)")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(table)), [textwrap.fill(s.setting, _LABEL_WIDTH) for s in table], fontsize=8)
    axes[0][0].invert_yaxis()
    counts = sorted({s.spreads[sweep.objective].n for s in table})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    note = "; hollow diamonds: the paper's value, one seed" if sweep.paper else ""
    figure.suptitle(f"{sweep.name} ({sweep.scale.name}): mean ± std over seeds, {n}, ranked by {title(sweep.objective)}{note}", fontsize=9)
    _write_figure(figure, path)


def _write_figure(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
    write_atomic(path, data.getvalue())


def draw_costs(view: View, path: Path) -> None:
    """Write the picture of accuracy against cost: means with standard deviations, and the paper's values as hollow diamonds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sweep, table = view.sweep, told_settings(view)[0]
    cost = sweep.costs[0]
    shown = [m for m in sweep.headline if m.endswith("top1")]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5.6 * len(shown), 4.4), squeeze=False)
    for axis, metric in zip(axes[0], shown, strict=True):
        for i, summary in enumerate(table):
            color, x, y = f"C{i}", summary.costs[cost], summary.spreads[metric]
            if x.mean is not None and y.mean is not None:
                axis.errorbar(x.mean, y.mean, xerr=x.std, yerr=y.std, fmt="o", color=color, capsize=3)
                axis.annotate(summary.setting, (x.mean, y.mean), xytext=(6, 5), textcoords="offset points", fontsize=8, color=color)
            if metric in summary.paper and cost in summary.paper:
                star = "*" if summary.setting in sweep.best_of_many else ""
                point = summary.paper[cost], summary.paper[metric]
                axis.plot(*point, "D", markerfacecolor="none", color=color)
                label = f"{summary.setting}, paper{star}"
                axis.annotate(label, point, xytext=(6, -10), textcoords="offset points", fontsize=7, color=color)
        axis.set_xlabel(title(cost))
        axis.set_ylabel(f"{title(metric)} (%)")
        axis.margins(x=0.25)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    note = "; hollow diamonds: the paper's values, one seed" if sweep.paper else ""
    note += ", * each the best of several runs" if sweep.best_of_many else ""
    figure.suptitle(f"{sweep.name} ({sweep.scale.name}): mean ± std over seeds{note}", fontsize=9)
    _write_figure(figure, path)


def write_all(view: View) -> list[Path]:
    """Rebuild every view in the sweep folder; returns their paths."""
    folder = view.sweep.path
    write_atomic(folder / "results.csv", results_csv(view))
    write_atomic(folder / "summary.csv", summary_csv(view))
    draw(view, folder / "ablation.png")
    written = [folder / "results.csv", folder / "summary.csv", folder / "ablation.png"]
    if view.sweep.costs:
        draw_costs(view, folder / "accuracy_against_cost.png")
        written.append(folder / "accuracy_against_cost.png")
    return written
