"""Show the state of a sweep and write its results.

`python -m sweeps.execution.monitor SWEEP_FOLDER` does so while Slurm runs the sweep; the command
that submits a sweep becomes this process. It needs no torch, is light enough for a login node, and
may be ended at any moment. It resubmits workers whose jobs ended before their trials did.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from jobs.cli import INTERRUPTED, begun, exit_status, handling, printable, scores_later
from jobs.slurm.queue import Queue, SlurmError
from jobs.slurm.waiting import NOT_SCHEDULED
from sweeps.execution.rebuilding import rebuild
from sweeps.execution.slurm_array import RacedError, SlurmEngine
from sweeps.execution.submitting import QueueFullError
from sweeps.execution.watcher import Watcher
from sweeps.report import aggregate, tables
from sweeps.report.status import (
    counts_line,
    damaged_lines,
    skipped_lines,
    sweep_status,
    unlisted_line,
    waiting_jobs,
)
from sweeps.report.usage import advice_lines, await_records
from sweeps.search.search import is_over, why_over
from sweeps.state.folder import Sweep
from sweeps.state.logs import log_tail
from sweeps.state.place import Place
from sweeps.state.submission import Submission
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

_LOOK_SECONDS = 10.0
_FOUND_NOTHING = 3  # submissions in a row whose jobs may end well without a trial
_FULL_SECONDS = 120.0  # before a queue that was full is tried again; the jobs do so as they end


class SafeConsole(Console):
    """A console on which brackets are text, no markup, and control characters are escaped."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return text to show; rich passes every string through here."""
        return super().render_str(printable(text, keep="\n"), **options)


def wide_console() -> Console:
    """Return a console that is wide enough for the tables, in a file or pipe too."""
    console = SafeConsole(file=sys.stdout, markup=False)
    return console if console.is_terminal else SafeConsole(file=sys.stdout, width=150, markup=False)


def progress_made(view: View) -> tuple[int, int, int]:
    """Return the numbers of trials chosen, of claims (one per attempt) and of trials ended.

    If a round changes none of them, further rounds would not either.
    """
    states = view.states()
    begun = sum(len(view.claims(t)) for t in view.sweep.trials)
    return len(states), begun, sum(s.ended for s in states.values())


def conclude(view: View, console: Console) -> int:
    """Write and show the results; return 1 if a run failed, is damaged or lacks a probe's value, else 0."""
    await_records(view)  # before the page, which holds the same lines
    paths, page = tables.write_all(view), view.sweep.path / "report.html"
    cause = rebuild(view.sweep.path)
    again = f"python -m sweeps report {shlex.quote(str(view.sweep.path))}"
    not_made = f": not written: {cause}; the results are complete without it; to write it: {again}" if cause else ""
    console.print(tables.terminal_table(view, console.width))
    bad = [r for r in aggregate.rows(view) if r.state is TrialState.failed or (r.state is TrialState.completed and r.cause)]
    damaged, names = damaged_lines(view), {t.signature: t.name for t in view.sweep.trials}
    for line in [*(f"{names[row.signature]}: {row.state.name}: {row.cause}" for row in bad), *damaged]:
        console.print(line, highlight=False, soft_wrap=True)
    if any(row.state is TrialState.completed for row in bad):
        console.print(scores_later(view.sweep.path), highlight=False, soft_wrap=True)
    ended = [{"signature": t.signature, "skipped_images": r.skipped_images} for t in view.sweep.trials if (r := view.result(t))]
    noted = [*skipped_lines(view, {"trials": ended}), *filter(None, [why_over(view), unlisted_line(view)]), *view.sweep.nodes.lines()]
    for line in [*noted, *_advice(view), *map(str, paths), f"{page}{not_made}"]:
        console.print(line, highlight=False, soft_wrap=True)
    return 1 if bad or damaged else 0


def _advice(view: View) -> list[str]:
    """Return advice, or why there is none: the results are complete without it."""
    try:
        return advice_lines(view)
    except ValueError as error:
        return [f"no advice: {error}"]


class SlurmWatch:
    """Watches a sweep whose workers are in Slurm's queue."""

    def __init__(self, folder: Path, console: Console) -> None:
        self.folder, self.console = folder, console
        self.queue = Queue(refresh_seconds=_LOOK_SECONDS / 2)
        self.read = float("-inf")
        self.waited_for: set[tuple[str, str]] = set()
        self.full_until = float("-inf")
        self.reload()
        self.missing_before = 0
        self.found_nothing: set[int] = set()  # submissions in a row whose jobs found no trial to begin
        # The command that became this process resumed or withdrew what was cancelled before.
        self.cancelled_before = self.engine.cancelled_unclaimed(self.view)

    def reload(self) -> None:
        """Read what another command changed in the sweep."""
        changed = (self.folder / "sweep.json").stat().st_mtime
        if changed == self.read:
            return
        self.read = changed
        sweep = Sweep.load(self.folder)
        self.view = View(sweep, queue=self.queue, remember_seconds=_LOOK_SECONDS / 2)
        engine = SlurmEngine.of(sweep, self.queue)
        assert engine is not None, "a sweep that is watched has a submission"
        self.engine = engine

    def repair(self) -> bool:
        """Resubmit workers missing at two looks in a row; return False if nothing is under way.

        An array task that a person cancelled before it claimed a trial is not replaced. Raise
        SlurmError if jobs end before they claim one.
        """
        missing = self.engine.missing(self.view) - len(self.engine.cancelled_unclaimed(self.view) - self.cancelled_before)
        workers, self.missing_before = min(missing, self.missing_before), missing
        if self.queue.silent:
            return True
        if not self.engine.is_settled():
            # A job that was killed may have left a submission open, which nobody else settles.
            self.engine.unsettled(lambda text: self.console.print(text, highlight=False, soft_wrap=True))
            return True
        if workers <= 0:
            return bool(self.engine.live()) or missing > 0
        if self.ended_in_vain():
            logs = sorted((self.folder / "log").glob("*.log"), key=lambda p: p.stat().st_mtime)
            said = log_tail(logs[-1]) if logs else "they left no log"
            raise SlurmError(f"jobs end before they start a trial: {said}; see {self.folder / 'log'}")
        if time.monotonic() < self.full_until:
            return True
        try:
            for made in self.engine.submit(workers):
                what = made.what if made.allocation else f"{made.size} workers whose jobs had ended"
                self.console.print(f"submitted again: job {made.job}, {what}", highlight=False)
        except RacedError:  # another command resubmits too
            return True
        except QueueFullError as error:
            self.engine.refused = str(error)
        if self.engine.refused:
            self.full_until = time.monotonic() + _FULL_SECONDS
        return True

    def ended_in_vain(self) -> bool:
        """Return whether the jobs that were submitted last have ended before they could begin a trial.

        Where others have begun trials, jobs that ended well have found none to begin: another job
        was faster. But they do so only a few times in a row.
        """
        last = Submission.all_of(self.engine.sweep)[-1]
        jobs = {c.slurm.job.partition("_")[0] for t in self.engine.sweep.trials for c in self.view.claims(t) if c.slurm}
        if last.place is not Place.here or not last.job or last.job in jobs:
            self.found_nothing.clear()
            return False
        if last.job in {e.array for e in self.engine.live()}:
            return False
        ended_well = all(e.state == "COMPLETED" for e in self.engine.queue.named(last.name))  # none is listed of jobs of long ago
        if not jobs or not (ended_well or self.engine.sweep.search is not None):
            return True
        self.found_nothing.add(last.number)
        return len(self.found_nothing) > _FOUND_NOTHING and self.engine.sweep.search is None

    def run(self, then: Sequence[str] = ()) -> int:
        """Watch until all trials are settled or nothing more happens; return the exit status, or become the command `then`."""
        with handling(signal.default_int_handler, signal.SIGTERM), Watcher(self.view, self.console) as watcher:
            while True:
                self.reload()
                watcher.view = self.view
                watcher.show()
                self.say_why_jobs_wait()
                if is_over(self.view) or not self.repair():
                    break
                time.sleep(_LOOK_SECONDS)
        if is_over(self.view) and all(s.ended for s in self.view.states().values()):
            if then:
                sys.stdout.flush()
                os.execv(then[0], [*then])  # noqa: S606, no shell is wanted
            return conclude(self.view, self.console)
        self.console.print(f"{counts_line(sweep_status(self.view))}; run the same command to resume what was cancelled", soft_wrap=True)
        return INTERRUPTED

    def say_why_jobs_wait(self) -> None:
        """Print, once per array and reason, why jobs wait, and what to do if they cannot start."""
        for found in waiting_jobs(self.view):
            if found.reason != NOT_SCHEDULED and (found.array, found.reason) not in self.waited_for:
                self.waited_for.add((found.array, found.reason))
                self.console.print(found.line, highlight=False, soft_wrap=True)


def main() -> int:
    """Run the command line, `FOLDER [WORD ...]`; return the exit status of a sweep."""
    return exit_status(lambda: watch(Path(sys.argv[1]), sys.argv[2:]))


def watch(folder: Path, then: Sequence[str] = ()) -> int:
    """Watch the sweep of `folder` until it ends; its jobs have begun. `then` is a command that takes over once all trials have ended."""
    begun()
    console = wide_console()
    try:
        return SlurmWatch(folder, console).run(then)
    except KeyboardInterrupt:
        console.show_cursor()
        console.print("the jobs continue without this command; run it again to watch them", soft_wrap=True)
        console.print(f"python -m sweeps status|logs|cancel {shlex.quote(str(folder))}", soft_wrap=True, highlight=False)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
