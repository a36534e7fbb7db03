"""Show a sweep's state while it runs: the board on a terminal, else a line for each change."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live

from sweeps.execution.rebuilding import Rebuilding
from sweeps.report.board import Board, called, duration, left_line, score
from sweeps.report.standing import Standing, standing
from sweeps.report.status import counts_line, skipped_lines, sweep_status, warning_lines
from sweeps.state.view import View

STARTING_WORKERS = "starting workers"  # a phase that ends when a trial runs
_PROBE_SECONDS = 300.0  # in which a file gets one line at most about the probes of a trial
_QUIET_SECONDS = 600.0  # without a line, before one says how far the running trials are


class Watcher:
    """Display of a sweep's state."""

    def __init__(self, view: View, console: Console, workers: int = 0) -> None:
        """Take the sweep, where to show it, and how many trials run at once if that is known."""
        self.view, self.console, self.workers = view, console, workers
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._started = time.monotonic()
        self._page = Rebuilding(view.sweep.path)
        self._phase = ""
        self._standing: tuple[object, Standing] = None, Standing("", "")
        self._changes = Changes()
        self._said: set[str] = set()
        self._printed = time.monotonic()

    def __enter__(self) -> "Watcher":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        self._page.close()

    def enter(self, phase: str) -> None:
        """Note what the command does from now on, such as 'starting Ray', until it is told otherwise; "" for watching."""
        if phase and phase != self._phase and not self._live:
            self.say(phase)
        self._phase = phase

    def say(self, line: str) -> None:
        """Print a line, with the time; on a terminal it stands above the board."""
        self._printed = time.monotonic()
        self.console.print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", highlight=False, soft_wrap=True)

    def show(self) -> None:
        """Read the run folders and refresh the display."""
        status = sweep_status(self.view, self.workers)
        self._page.look(counts_line(status))
        if self._phase == STARTING_WORKERS and status["counts"]["running"]:
            self._phase = ""
        leads = self._who_leads(status)
        warned = [*status["damaged"], *status["nodes"], *skipped_lines(self.view, status), *warning_lines(self.view, status)]
        if self._live:
            board = Board(status, leads, self.view.sweep.path, self._phase, time.monotonic() - self._started)
            self._live.update(board.fitted(self.console, self.console.height - 1, warned), refresh=True)
            return
        for line in warned:
            if line not in self._said:
                self._said.add(line)
                self.say(line)
        for line in self._changes.of(status, leads):
            self.say(line)
        if time.monotonic() - self._printed > _QUIET_SECONDS and (line := how_far(status)):
            self.say(line)

    def _who_leads(self, status: Mapping[str, Any]) -> Standing:
        """Return who leads; it is judged again only when a trial has got a score or lost one."""
        scores = frozenset((t["signature"], t["objective"]) for t in status["trials"] if t["objective"] is not None)
        if self._standing[0] != scores:
            self._standing = scores, standing(self.view)
        return self._standing[1]


def how_far(status: Mapping[str, Any]) -> str:
    """Return how far each running trial is, or "" if none runs."""
    running = [f"{called(t)} {100 * t['done']:.0f} %" for t in status["trials"] if t["state"] == "running"]
    shown = ", ".join(running[:8]) + f" and {len(running) - 8} more" * (len(running) > 8)
    return "; ".join(filter(None, [f"running: {shown}", left_line(status["seconds_left"])])) if running else ""


class Changes:
    """Finds what has changed from one look at a sweep to the next, in one line each."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[str, Any, bool, bool]] | None = None
        self._probed: dict[str, float] = {}  # run ID -> when its last probe was said

    def of(self, status: Mapping[str, Any], leads: Standing) -> list[str]:
        """Return a line for each change since the last look; at the first one, the counts of all trials."""
        now = {t["signature"]: (t["state"], self._news(t), bool(t["idle"]), bool(t["refused"])) for t in status["trials"]}
        before, self._before = self._before, now
        how_long = left_line(status["seconds_left"])
        if before is None:
            return ["; ".join(filter(None, [counts_line(status), how_long, leads.best and f"best so far: {leads.best}"]))]
        done = sum(status["counts"].get(name, 0) for name in ("completed", "pruned", "failed", "damaged"))
        tail = "; ".join(filter(None, [f"{done} of {len(now)} ended", how_long]))
        found: list[str] = []
        for t in status["trials"]:
            found += _lines(t, now[t["signature"]][1], before.get(t["signature"]), status["unit"], leads)
        return [f"{line}; {tail}" for line in found]

    def _news(self, t: Mapping[str, Any]) -> Any:
        """Return the last probe of a trial, or the one before if that was said only now."""
        known, clock = (self._before or {}).get(t["signature"], ("", None, False, False))[1], time.monotonic()
        if t["probe"] == known or clock - self._probed.get(t["signature"], float("-inf")) < _PROBE_SECONDS:
            return known
        self._probed[t["signature"]] = clock
        return t["probe"]


def _lines(t: Mapping[str, Any], news: Any, before: tuple[str, Any, bool, bool] | None, unit: str, leads: Standing) -> Iterator[str]:
    """Yield what has changed of a trial; `news` is its last probe, and `before` is None for one that a search has just chosen."""
    state, name = t["state"], called(t)
    was, probe, idle, refused = before or ("waiting", None, False, False)
    if state != was:
        yield f"{name} {state}{_about(t, unit, leads)}"
    elif state == "running" and news is not None and news != probe:
        yield f"{name} probed: {_scored(news, unit)} after {100 * t['done']:.0f} %"
    if t["idle"] and not idle:
        yield f"{name} may be stuck: {t['idle']}"
    if t["refused"] and not refused:
        yield f"{name} waits for the disk: {t['refused']}"


def _about(t: Mapping[str, Any], unit: str, leads: Standing) -> str:
    """Return what is said of a trial beside its new state: score and cost, or cause, or where it runs."""
    if t["state"] == "completed":
        cost = [f"{t['device_hours']:.3g} device-hours"] if t["device_hours"] else []
        took = [f"took {duration(t['seconds'])}"] if t["seconds"] else []
        value = _scored(t["objective"], unit) if t["objective"] is not None else f"no score: {'; '.join(t['missing'].values())}"
        return f": {', '.join([value, *cost, *took])}" + (f"; best so far: {leads.best}" if leads.best else "")
    if t["state"] == "running":
        again = [f"attempt {t['restarts'] + 1}"] if t["restarts"] else []
        where = [f"job {t['job']} on {t['node']}"] if t["job"] else []
        return "".join(f", {what}" for what in [*again, *where])
    return f": {t['cause']}" if t["cause"] else ""


def _scored(value: float, unit: str) -> str:
    return f"{score(value, unit)}{' ' * bool(unit)}{unit}"
