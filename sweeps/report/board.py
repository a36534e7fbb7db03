"""Draw the board of a sweep: what is best, what runs, what is stuck, when it ends. `status` and the live display show it."""

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from jobs.cli import printable
from jobs.task import score_format
from sweeps.report.standing import Standing
from sweeps.report.status import counts_line
from sweeps.report.terminal import Column, fitted, needs

MOST_LINES = 40  # of each kind, where the height of the terminal sets no limit
_FEWEST = 3  # running trials that a low terminal shows before it shows completed ones
_EDGES = 4  # cells that a table without edges needs less
_ROOMY = 30  # lines of a terminal that has room for empty ones
_UNENDED = ("running", "requeued", "interrupted", "cancelled")

Trial = Mapping[str, Any]  # as trial_status returns it


def duration(seconds: float) -> str:
    """Return '45 s', '12 min', '3.4 h' or '2.5 d'."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def left_line(seconds: float | None, now: float | None = None) -> str:
    """Return 'about 14 min left, until 02:31', or "" if it is unknown."""
    if seconds is None:
        return ""
    now = time.time() if now is None else now
    far = seconds > 20 * 3600
    return f"about {duration(seconds)} left, until {time.strftime('%a %H:%M' if far else '%H:%M', time.localtime(now + seconds))}"


def score(value: float | None, unit: str) -> str:
    """Return a score as tables show it, "" for none."""
    return "" if value is None else f"{value:{score_format(unit, 1)}}"


def called(t: Trial) -> str:
    """Return the name of a trial; where its label is not in ASCII, of which names consist, the label itself."""
    return str(t["name"]) if t["setting"].isascii() else f"{t['number']:02d} {t['setting']}, seed {t['seed']}"


def named(folder: Path) -> str:
    """Return the sweep folder as it would be typed here."""
    relative = os.path.relpath(folder)
    return shlex.quote(relative if not relative.startswith("..") else str(folder))


def activity(status: Mapping[str, Any]) -> str:
    """Return what happens now: '2 training, 1 probing', or why nothing does."""
    running = [t for t in status["trials"] if t["state"] == "running"]
    doing = [t["phase"] or "running" for t in running]
    if doing:
        return ", ".join(f"{doing.count(what)} {what}" for what in dict.fromkeys(doing))
    if status["waiting"]:
        return f"no trial runs; {status['waiting'][0]['line']}"
    counts = status["counts"]
    unended = sum(counts.get(name, 0) for name in ("waiting", "requeued", "interrupted"))
    return f"no trial runs, {unended} wait" if unended else ""


@dataclass
class _Shown:
    """How many trials of each kind and lines below are shown."""

    completed: int
    active: int
    failed: int
    below: int

    def reduce(self, lines: int) -> bool:
        """Show fewer, by `lines` at most; return False if nothing is left to leave out."""
        # Completed trials give way first, then the lines below, then running trials, and last failures.
        for name, least in (
            ("completed", 1),
            ("completed", 0),
            ("below", 2),
            ("active", _FEWEST),
            ("failed", 1),
            ("below", 0),
            ("active", 0),
        ):
            if (now := getattr(self, name)) > least:
                setattr(self, name, max(now - lines, least))
                return True
        return False


class Board:
    """The board of one look at a sweep."""

    def __init__(self, status: Mapping[str, Any], standing: Standing, folder: Path, phase: str = "", since: float | None = None) -> None:
        """Take what `sweep_status` returned, who leads, the sweep folder, and what the command does now if it knows.

        `since` is for how many seconds the command has run.
        """
        self.status, self.standing, self.folder, self.phase, self.since = status, standing, folder, phase, since
        self.unit = status["unit"]
        trials = status["trials"]
        active = [t for t in trials if t["state"] in _UNENDED]
        # What may be stuck comes first, then what runs, the nearest to its end first.
        self.active = sorted(active, key=lambda t: (not t["idle"] and not t["refused"], t["state"] != "running", -t["done"]))
        self.failed = [t for t in trials if t["state"] in ("failed", "damaged")]
        sign = status["sign"]
        done = [t for t in trials if t["state"] == "completed"]
        self.completed = sorted(done, key=lambda t: (t["objective"] is None, -sign * (t["objective"] or 0.0)))

    def fitted(self, console: Console, height: int | None = None, below: Sequence[str] = ()) -> RenderableType:
        """Return the board, with the lines `below` it, in the width of the console and in `height` lines, None for any number."""
        most = MOST_LINES if height is None else min(MOST_LINES, height)
        completed, active, failed = (min(len(these), most) for these in (self.completed, self.active, self.failed))
        shown = _Shown(completed, active, failed, len(below))
        while True:
            made = Group(*self._parts(console.width, shown, below, height is None or height >= _ROOMY))
            over = 0 if height is None else len(console.render_lines(made, pad=False)) - height
            if over <= 0 or not shown.reduce(over):
                return made

    def _parts(self, width: int, shown: "_Shown", below: Sequence[str], roomy: bool) -> list[RenderableType]:
        """Return the parts of the board with what is `shown`, and lines about what is left out."""
        head = f"{self.status['name']} ({self.status['scale']}): {counts_line(self.status)}"
        parts: list[RenderableType] = [Text(printable(head), style="bold"), self._facts(shown.failed)]
        self._without: dict[str, None] = {}
        for table in (self._of_active(self.active[: shown.active], width), self._of_completed(self.completed[: shown.completed], width)):
            if table.row_count:
                parts += [Text()] * roomy + [table]
        notes, of_sweep = [], f"python -m sweeps status {named(self.folder)} --json"
        if n := len(self.completed) - shown.completed:
            notes.append(f"{n:,} {'more ' * bool(shown.completed)}completed; python -m sweeps results {named(self.folder)} shows all")
        more = {"more not ended": len(self.active) - shown.active, "more failed": len(self.failed) - shown.failed}
        if any(more.values()):
            notes.append(f"{', '.join(f'{n:,} {what}' for what, n in more.items() if n)}; {of_sweep} has all")
        if self._without:
            notes.append(f"not in this width: {', '.join(self._without)}")
        notes += below[: shown.below]
        if n := len(below) - shown.below:
            notes.append(f"{n} more lines; python -m sweeps status {named(self.folder)} shows all")
        return parts + [Text(printable(line)) for line in notes]

    def _facts(self, failed: int) -> Table:
        """Return the time left, what happens now, the best, the baseline, and what went wrong."""
        grid = Table.grid(padding=(0, 1))
        grid.add_column(no_wrap=True, min_width=8)
        grid.add_column(overflow="fold")
        when = left_line(self.status["seconds_left"]) if any(t["state"] == "running" for t in self.status["trials"]) else ""
        since = f"this command has run for {duration(self.since)}" if self.since is not None else ""
        rows = [
            ("time", "; ".join(filter(None, [when, since])), ""),
            ("now", self.phase or activity(self.status), ""),
            ("best", self.standing.best, "bold"),
            ("baseline", self.standing.baseline, ""),
        ]
        rows += [("stuck", f"{called(t)}: {t['idle']}", "yellow") for t in self.active[:MOST_LINES] if t["idle"]]
        rows += [("disk", f"{called(t)} waits for the disk: {t['refused']}", "yellow") for t in self.active[:MOST_LINES] if t["refused"]]
        rows += [(t["state"], f"{called(t)}: {t['cause']}", "red") for t in self.failed[:failed]]
        for name, text, style in rows:
            if text:
                grid.add_row(name, Text(printable(text), style=style))
        return grid

    def _of_active(self, trials: Sequence[Trial], width: int) -> Table:
        now, counted = time.time(), self.status["counted"]
        form = ".1f" if counted == "epochs" else ",.0f"

        def cells(t: Trial) -> list[str]:
            state = (t["phase"] or "running") if t["state"] == "running" else t["state"]
            step = f"{duration(max(now - t['last_step'], 0.0))}" if t["last_step"] and t["state"] == "running" else ""
            left = duration(t["seconds_left"]) if t["seconds_left"] is not None and not t["idle"] else ""
            reached = "" if t["epoch"] is None else f"{t['epoch']:{form}}/{t['length']:,}"
            return [called(t), state, reached, step, score(t["probe"], self.unit), left, *self._rest(t)]

        names = ["trial", "state", counted.removesuffix("s"), "last step", "probe", "left", "loss", "images/s", "restarts", "node", "job"]
        return self._table(names, list(map(cells, trials)), width, {"trial", "state", "node", "job"}, keep=6)

    def _rest(self, t: Trial) -> list[str]:
        """Return the cells for which a narrow terminal has no room."""
        loss = "" if t["loss"] is None else f"{t['loss']:.4f}"
        speed = "" if t["images_per_second"] is None else f"{t['images_per_second']:.0f}"
        return [loss, speed, str(t["restarts"] or ""), t["node"] or "", t["job"] or ""]

    def _of_completed(self, trials: Sequence[Trial], width: int) -> Table:
        def cells(t: Trial) -> list[str]:
            role = {self.standing.leading: "best", self.standing.first: "baseline"}.get(t["setting"], "")
            cost = "" if t["device_hours"] is None else f"{t['device_hours']:.3g}"
            ended = time.strftime("%m-%d %H:%M", time.localtime(t["ended"])) if t["ended"] else ""
            value = score(t["objective"], self.unit) or "none"
            took = duration(t["seconds"]) if t["seconds"] else ""
            return [called(t), value, cost, took, role, ended, str(t["restarts"] or ""), t["node"] or "", t["job"] or ""]

        names = ["completed", "score", "device-hours", "took", "of the", "ended", "restarts", "node", "job"]
        return self._table(names, list(map(cells, trials)), width, {"completed", "of the", "node", "job"}, keep=4)

    def _table(self, names: Sequence[str], rows: Sequence[Sequence[str]], width: int, words: set[str], keep: int) -> Table:
        """Return a table of these columns; the first `keep` are always there, others if some row has something to show and they fit."""
        columns = [
            Column(name, [row[i] for row in rows], name in words, 1, keep=i < keep)
            for i, name in enumerate(names)
            if i < keep or any(row[i] for row in rows)
        ]
        # Names stay whole as long as a column can be left out instead.
        while not columns[-1].keep and needs(columns) > width + _EDGES:
            self._without[columns.pop().name] = None
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        return fitted(columns, width + _EDGES, table, "a wider terminal or --json has all")
