"""`python -m sweeps list` and `python -m sweeps compare`: look at several sweeps at once."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.cli import printable, resolved
from jobs.task import score_format
from sweeps.report import listing
from sweeps.report.aggregate import title
from sweeps.report.compare import Compared, Pair, Side, as_json, compared, shown
from sweeps.report.terminal import Column, fitted
from sweeps.state.folder import Sweep
from sweeps.state.view import View

LIST, COMPARE = "list", "compare"
SIDES = ("first", "second")
_MOST = 20  # configurations that only one sweep has, and keys


def add_commands(commands: Any) -> None:
    """Add the parsers of both commands."""
    does = "list the sweeps of a folder: how far each is, its best, and the command that goes on"
    made = commands.add_parser(
        LIST, help=does, description=f"{does[0].upper()}{does[1:]}.", epilog="example:\n  python -m sweeps list runs"
    )
    what = made.add_argument_group("what to show")
    what.add_argument("runs", nargs="?", type=Path, default=Path("runs"), metavar="RUNS", help="folder of sweeps (default: %(default)s)")
    made.add_argument_group("how").add_argument("--json", action="store_true", help="print one JSON object")
    does = "compare two sweeps: configurations side by side, and what differs in base configuration and code"
    shown_so = "python -m sweeps compare runs/predictor_ablation-smoke runs/predictor_ablation-smoke-epochs20"
    made = commands.add_parser(COMPARE, help=does, description=f"{does[0].upper()}{does[1:]}.", epilog=f"example:\n  {shown_so}")
    what = made.add_argument_group("what to show")
    for name, said in (("first", "a sweep's folder; its objective counts"), ("second", "another one")):
        what.add_argument(name, type=Path, metavar=name.upper(), help=said)
    made.add_argument_group("how").add_argument("--json", action="store_true", help="print one JSON object")


def show(asked: argparse.Namespace, console: Console) -> int:
    """Print what one of the commands asks for; return 0. Raise ValueError at a folder that is none."""
    if asked.command == LIST:
        return show_list(resolved(asked.runs, "RUNS"), asked.json, console)
    folders = [resolved(path, name) for path, name in ((asked.first, "FIRST"), (asked.second, "SECOND"))]
    if folders[0] == folders[1]:
        raise ValueError(f"SECOND must be another sweep than FIRST; got {folders[1]} twice")
    first, second = (View.here(Sweep.load(folder)) for folder in folders)
    found = compared(first, second)
    if asked.json:
        print(json.dumps(as_json(found, first, second)))
        return 0
    table, lines = in_words(found, first, second, console.width)
    if table.row_count:
        console.print(table, highlight=False)
    for line in lines:
        console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
    return 0


def show_list(runs: Path, as_object: bool, console: Console) -> int:
    """Print the sweeps of a folder; return 0."""
    found = listing.sweeps_in(runs)
    if as_object:
        print(json.dumps({"runs": str(runs), "sweeps": found}))
        return 0
    if not found:
        console.print(f"no sweep in {runs}", highlight=False, soft_wrap=True, markup=False)
        return 0
    console.print(listing.table(found, runs, console.width), highlight=False)
    for line in listing.to_go_on(found):
        console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
    return 0


def in_words(found: Compared, first: View, second: View, width: int) -> tuple[Table, list[str]]:
    """Return the table of the configurations that both have, and the lines below it."""
    table = Table(title=f"{title(first, found.metric)}: mean ± std over seeds (n)", title_justify="left")
    form = score_format(first.sweep.task.UNIT, 1)
    columns = [Column("configuration", [printable(p.first.summary.label) for p in found.pairs], words=True, keep=True)]
    for side, name in enumerate(SIDES, 1):
        texts = [shown((p.first, p.second)[side - 1].summary.spreads[found.metric]) for p in found.pairs]
        columns.append(Column(name, [Text(t, style="bold" if p.better == side else "") for t, p in zip(texts, found.pairs)], keep=True))
    columns.append(Column("second - first", [_difference(p, form) for p in found.pairs]))
    columns.append(Column("judged", [_judged(p) for p in found.pairs], keep=True))
    return fitted(columns, width, table, "compare --json has all"), _lines(found, first, second)


def _difference(pair: Pair, form: str) -> str:
    """Return '+1.3 (0.4 to 2.2)'."""
    if (of := pair.comparison) is None:
        return "-"
    interval = f" ({of.low:{form}} to {of.high:{form}})" if of.low is not None and of.high is not None else ""
    return f"{of.difference:+{form}}{interval}"


def _judged(pair: Pair) -> str:
    if pair.comparison is None or pair.p is None:
        return "-" if pair.comparison is None else "no test"
    return f"{SIDES[pair.better - 1] if pair.better else 'tied'}, p {'< 0.001' if pair.p < 0.001 else f'= {pair.p:.2g}'}"


def _lines(found: Compared, first: View, second: View) -> list[str]:
    lines = [f"{name}: {view.sweep.path}" for name, view in zip(SIDES, (first, second))]
    by = f"matched by {', '.join(found.varied)}" if found.varied else "each the only one of its sweep"
    lines.append(f"configurations of both: {len(found.pairs)}, {by}")
    tested, scored = (sum(pair.p is not None for pair in found.pairs), sum(pair.comparison is not None for pair in found.pairs))
    if tested:
        rule = "bold: significantly higher, all judged together at 5 %"
        lines.append(f"{rule}; in brackets the 95 % interval of one pair alone; {_which(found)} is better")
    if any(p.comparison is not None and p.comparison.test.startswith("paired") for p in found.pairs):
        lines.append("second - first is over the seeds that both have, where these are two or more")
    if tested < scored:
        lines.append("no test: two runs of each are needed, and runs that differ")
    for name, sides in zip(SIDES, found.only):
        lines += [f"only in the {name}: {len(sides)}: {_some([_only(side, found.metric) for side in sides])}"] if sides else []
    lines += [f"base: {key}: {_value(a)} -> {_value(b)}" for key, a, b in found.base[:_MOST]] or ["base: the same configuration"]
    lines += [f"base: and {len(found.base) - _MOST} further keys; --json has all"] if len(found.base) > _MOST else []
    return [*lines, *(f"code: {line}" for line in found.code)]


def _which(found: Compared) -> str:
    return "higher" if found.sign > 0 else "lower"


def _only(side: Side, metric: str) -> str:
    return f"{side.summary.label} {shown(side.summary.spreads[metric])}" if metric in side.summary.spreads else side.summary.label


def _some(texts: list[str]) -> str:
    return "; ".join(texts[:_MOST]) + "; ..." * (len(texts) > _MOST)


def _value(value: Any) -> str:
    return "none" if value is None else str(value) or '""'
