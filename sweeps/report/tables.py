"""Write results.csv, summary.csv and the table for people: terminal, Markdown, LaTeX."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from cnnjepa.run.files import write_atomic
from jobs.cli import printable
from jobs.task import score_format
from sweeps.report import plots
from sweeps.report.aggregate import (
    COSTS,
    Leader,
    Spread,
    Summary,
    against_the_baseline,
    columns,
    images_behind,
    judged,
    leader_of,
    may_be_best,
    references,
    rows,
    summaries,
    title,
)
from sweeps.report.best import is_estimated, looks_line, score_of_best
from sweeps.report.chance import chance_lines
from sweeps.report.seen import Seen
from sweeps.report.terminal import Column, fitted
from sweeps.spec import hyperparameters
from sweeps.spec.sweep import Trial
from sweeps.state import curves
from sweeps.state.view import View

_TIED = "†"
LEFT_OUT = "left out"
TRIALS = "trials"  # their numbers
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def csv_cell(value: Any) -> Any:
    """Return a cell of a CSV file: text that a spreadsheet would run as a formula begins with a quote.

    The quote is OWASP's remedy for CSV injection. Numbers stay as they are.
    """
    if not isinstance(value, str):
        return "" if value is None else value
    return f"'{printable(value)}" if value.startswith(_FORMULA) and not _NUMBER.fullmatch(value) else printable(value)


def _csv(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([list(map(csv_cell, line)) for line in [header, *lines]])
    return out.getvalue()


def _apart(keys: Sequence[str], taken: Sequence[str]) -> list[str]:
    """Return the columns of hyperparameters: their keys, with config. before one that another column has."""
    return [f"config.{key}" if key in taken else key for key in keys]


def results_csv(view: View) -> str:
    """Return one line per run, with a column per hyperparameter: what varies first. Missing values are empty."""
    table, trials = rows(view), view.sweep.trials
    metrics = sorted({m for row in table for m in row.metrics})
    keys = hyperparameters.columns(trials, view.sweep.search)
    # Columns of CSV files keep the names of version 0.1.
    first, last = ["signature", "setting", "seed", "state", "number", "name"], [*metrics, *COSTS, "cause"]
    lines = []
    for r, trial in zip(table, trials, strict=True):
        own = hyperparameters.chosen(trial, keys)
        about = [r.signature, r.label, r.seed, r.state.name, trial.number, trial.name, *(hyperparameters.cell(own.get(k)) for k in keys)]
        lines.append([*about, *(r.metrics.get(m) for m in metrics), *(r.costs.get(c) for c in COSTS), r.cause])
    return _csv([*first, *_apart(keys, [*first, *last]), *last], lines)


def by_configuration(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Return configuration -> its trials, in the sweep's order."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.configuration, []).append(trial)
    return found


def summary_csv(view: View) -> str:
    """Return one line per configuration, best first: mean, std and n of every metric.

    The paper's value is included if the scale is comparable. Hyperparameters have columns as in
    results.csv; `trials` has the names of the configuration's trials.
    """
    table, trials = summaries(view), view.sweep.trials
    own = by_configuration(trials)
    keys = hyperparameters.columns(trials, view.sweep.search)
    metrics = list(table[0].spreads) if table else []
    damaged = any(s.damaged for s in table)
    papers = sorted({m for s in table for m in s.paper})
    shown = [*metrics, *view.sweep.costs]
    measured = [*(f"{m}_{part}" for m in shown for part in ("mean", "std", "n")), *(f"{m}_paper" for m in papers)]
    lead = leader_of(view, table, view.sweep.objective)
    lines = []
    for s in table:
        spread = [v for m in shown for v in vars({**s.spreads, **s.costs}[m]).values()]
        counts = [s.failed, s.pruned, s.unfinished, s.parameters, s.device_hours, *[s.damaged] * damaged, *_judged_csv(s, lead)]
        values = hyperparameters.chosen(own[s.key][0], keys)
        about = [" ".join(t.name for t in own[s.key]), *(hyperparameters.cell(values.get(k)) for k in keys)]
        lines.append([s.label, *about, *spread, *(s.paper.get(m) for m in papers), *counts])
    for name, scores in references(view).items():
        spread = [v for m in shown for v in vars(scores.get(m, Spread.of([]))).values()]
        lines.append([name, *[None] * (1 + len(keys)), *spread, *[None] * (len(papers) + 5 + damaged + len(_JUDGED))])
    counted = ["failed", "pruned", "unfinished", "parameters", "device_hours", *["damaged"] * damaged]
    rest = [*measured, *counted, *_JUDGED]
    return _csv(["setting", "trials", *_apart(keys, ["setting", "trials", *rest]), *rest], lines)


# Of the objective, judged among all configurations: 1 or 0, 1 or 0, p, and for the best its score by seeds that did not select it.
_JUDGED = ("best", "may_be_best", "p_against_best", "estimate", "estimate_low", "estimate_high")


def _judged_csv(s: Summary, lead: Leader | None) -> list[Any]:
    """Return what is judged of a configuration, in the columns of _JUDGED; empty without a score."""
    if lead is None or not s.values.get(lead.metric):
        return [None] * len(_JUDGED)
    found, first = lead.winner, s.key == lead.best.key
    own = [found.estimate, found.low, found.high] if first else [None] * 3
    return [int(first and found.declared), int(s.key in found.candidates), None if first or found.p is None else found.against[s.key], *own]


@dataclass(frozen=True)
class Cell:
    """One field of the table: `bold` if it is the best, judged among all, `marked` if tied."""

    text: str
    bold: bool = False
    marked: bool = False

    def __str__(self) -> str:
        """Return the cell as plain text."""
        return self.text + (f" {_TIED}" if self.marked else "")


@dataclass(frozen=True)
class PeoplesTable:
    """The table for people in any format: header, lines of cells, and the notes they need."""

    header: list[str]
    lines: list[list[Cell]]
    notes: list[str]


def peoples_table(view: View, most: int | None = None, keys: Sequence[str] = (), seen: Seen | None = None) -> PeoplesTable:
    """Return mean ± std over seeds (n) of every configuration, ranked by the objective.

    With `most`, only so many of the best are shown, and a note says so. `keys` are hyperparameters
    that get a column each.
    """
    metrics, costs, seen = columns(view), view.sweep.costs, seen or Seen(view)
    whole, pruned = seen.shown
    table = whole[:most]
    papers = [m for m in [*view.sweep.headline, *costs] if any(m in s.paper for s in table)]
    leaders = seen.leaders
    # A sweep that asks about costs shows these instead of the total.
    total, form = [] if costs else ["device-hours"], score_format(view.sweep.task.UNIT)
    # What the evaluations took is told wherever there are some: it is in no other column.
    evaluated = "evaluation_hours" not in costs and any(s.costs["evaluation_hours"].n for s in table)
    costs = [*costs, *["evaluation_hours"] * evaluated]
    marks = [_left_out(s) for s in table]
    header = ["configuration", *keys, *(title(view, m) for m in metrics), *(f"paper: {title(view, m)}" for m in papers)]
    header += [*[LEFT_OUT] * any(marks), *(title(view, c) for c in costs), "parameters", *total, TRIALS]
    own = by_configuration(view.sweep.trials)
    lines = []
    for s, mark in zip(table, marks, strict=True):
        star = "*" if s.label in view.sweep.best_of_many else ""
        paper = [f"{s.paper[m]:{'.2f' if m in costs else form}}{star if m not in costs else ''}" if m in s.paper else "-" for m in papers]
        rest = [*paper, *[mark or "-"] * any(marks), *(s.costs[c].in_digits() for c in costs), f"{s.parameters:,}"]
        rest += [*[f"{s.device_hours:.3g}"] * len(total), ", ".join(str(t.number) for t in own[s.key])]
        values = [Cell(text) for text in hyperparameters.cells(own[s.key][0], keys)]
        lines.append([Cell(s.label), *values, *(_score(s, m, leaders[m]) for m in metrics), *map(Cell, rest)])
    compared = list(references(view).items()) if lines else []
    for name, scores in compared[:most]:
        cells = [f"{scores[m]}" + (f" ({scores[m].n})" if scores[m].std is not None else "") if m in scores else "-" for m in metrics]
        cells = [*["-"] * len(keys), *cells]
        lines.append([Cell(text) for text in [name, *cells, *["-"] * (len(header) - 1 - len(cells))]])
    rest = [f"{len(table)} best of {len(whole):,} configurations" if len(table) < len(whole) else ""]
    rest.append(f"{most} of {len(compared):,} references" if most is not None and len(compared) > most else "")
    shown = f"shown: {', '.join(filter(None, rest))}; summary.csv has all" if any(rest) else ""
    return PeoplesTable(header, lines, [*filter(None, [shown]), *_notes(seen, leaders, pruned)])


def _left_out(s: Summary) -> str:
    """Return '1 failed, 2 pending': the runs that are not in the means."""
    counts = {"failed": s.failed, "pruned": s.pruned, "damaged": s.damaged, "pending": s.unfinished}
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n)


def _score(s: Summary, metric: str, lead: Leader | None) -> Cell:
    spread = s.spreads[metric]
    if spread.mean is None:
        return Cell("-")
    best = lead is not None and lead.other is not None and lead.best.key == s.key
    return Cell(f"{spread} ({spread.n})", best and lead.significant, best and not lead.significant)  # type: ignore[union-attr]


def _notes(seen: Seen, leaders: dict[str, Leader | None], pruned: str) -> list[str]:
    """Return the notes that a reader of the table needs."""
    view, table = seen.view, seen.shown[0]
    notes = [f"mean ± std over seeds (n); {seen.run_set}"]
    tested = [lead for lead in leaders.values() if lead is not None and lead.other is not None]
    if tested:
        rule = "bold: the best of its column, judged among all configurations at 5 %, and only if it is so in the columns before"
        notes.append(
            f"{rule}; {_TIED}: the highest mean, but tied" if view.sweep.sign > 0 else f"{rule}; {_TIED}: the lowest mean, but tied"
        )
        for d in tested:
            against = f"{title(view, d.metric)}: {d.best.label} against the next, {d.other.label if d.other else ''}, {judged(d)}"
            notes.append(against)
            if d.metric == view.sweep.objective:
                how = ", by seeds that did not select it" if is_estimated(d) else ""
                notes.append(f"score of the best, {d.best.label}: {score_of_best(view, d)}{how}")
                notes += filter(None, [looks_line(view, d)])
                notes += [may_be_best(d), *(line.rstrip(".") for line in against_the_baseline(view, table, d))]
    notes += [line for line in (images_behind(view, leaders), *chance_lines(view, seen.shown[0]), pruned) if line]
    return [*notes, "* in the paper each score is the best of several runs"] if view.sweep.best_of_many else notes


MOST_LINES = 50  # configurations in a terminal's table


def terminal_table(view: View, width: int | None = None, most: int | None = MOST_LINES) -> Table:
    """Return the table for a terminal of `width` characters, None for any; see `peoples_table` for `most`."""
    found = peoples_table(view, most)
    heading = f"{view.sweep.name} ({view.sweep.scale.name}): best first"
    table = Table(title=heading, caption="\n".join(found.notes), caption_justify="left")
    columns = []
    for i, name in enumerate(found.header):
        cells = [Text(printable(str(line[i])), style="bold" if line[i].bold else "") for line in found.lines]
        columns.append(Column(name, cells, words=i == 0 or name in (LEFT_OUT, TRIALS), keep=i < 2 or name == TRIALS))
    return fitted(columns, width, table, "summary.csv has all")


def markdown_table(view: View) -> str:
    """Return the same table in Markdown, with its notes below."""
    found = peoples_table(view)

    def line(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    texts = [[f"**{cell}**" if cell.bold else str(cell) for cell in cells] for cells in found.lines]
    rule = ["---", *["---:"] * (len(found.header) - 1)]
    return "\n".join([line(found.header), line(rule), *map(line, texts), "", *(f"{note}  " for note in found.notes)]) + "\n"


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "†": r"$\dagger$"}
_TEX |= {"<": r"$<$", ">": r"$>$"} | {c: f"\\{c}" for c in "&%$#_{}"}


def tex(text: str) -> str:
    """Escape `text` for LaTeX."""
    escaped = re.sub("|".join(map(re.escape, _TEX)), lambda found: _TEX[found[0]], text)
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", escaped)


def latex_table(view: View) -> str:
    """Return the same table as a booktabs tabular, with its notes in small print below."""
    found = peoples_table(view)

    def line(cells: Sequence[str]) -> str:
        return "  " + " & ".join(cells) + r" \\"

    texts = [[rf"\textbf{{{tex(str(cell))}}}" if cell.bold else tex(str(cell)) for cell in cells] for cells in found.lines]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            rf"\begin{{tabular}}{{l{'r' * (len(found.header) - 1)}}}",
            r"  \toprule",
            line([tex(name) for name in found.header]),
            r"  \midrule",
            *map(line, texts),
            r"  \bottomrule",
            r"\end{tabular}",
            *(rf"\par\noindent{{\footnotesize {tex(note)}.}}" for note in found.notes),
            "",
        ]
    )


FORMATS: dict[str, Callable[[View], str]] = {"csv": summary_csv, "markdown": markdown_table, "latex": latex_table}


def write_all(view: View) -> list[Path]:
    """Write every table and plot of the sweep into its folder; return their paths."""
    folder = view.sweep.path
    write_atomic(folder / "results.csv", results_csv(view))
    write_atomic(folder / "summary.csv", summary_csv(view))
    plots.draw(view, folder / "ablation.png")
    curves.link_all(view.sweep)
    written = [folder / "results.csv", folder / "summary.csv", folder / "ablation.png"]
    if view.sweep.costs:
        plots.draw_costs(view, folder / "accuracy_against_cost.png")
        written.append(folder / "accuracy_against_cost.png")
    return written
