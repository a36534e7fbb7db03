"""Ask before a command takes trials out of a sweep's tables, as with fewer seeds or another base configuration."""

import argparse
import sys
from collections import Counter

from rich.console import Console

from sweeps.spec.sweep import Trial
from sweeps.state.folder import Sweep
from sweeps.state.view import View

_NAMED = 3  # trials in a message
_REMEDY = "--yes takes them out, and keeps their folders; --name NAME begins another folder"


def settle_withdrawn(sweep: Sweep, asked: argparse.Namespace, console: Console) -> None:
    """Let a person agree that trials which have begun leave the tables; say in a dry run that this is asked.

    Raise ValueError if nobody agrees. Nothing is written or deleted.
    """
    old, lost = withdrawn(sweep)
    if not lost:
        return
    line = f"{sweep.path} must keep its trials that have begun; this command leaves out {_shown(old, lost)}"
    if asked.dry_run:
        console.print(f"{line}: without --dry-run, {_REMEDY}", highlight=False, soft_wrap=True)
        return
    agreed = asked.agrees
    if not agreed and sys.stdin.isatty() and not getattr(asked, "embedded", False):
        agreed = input(f"{line}. Take them out of the tables? Their folders stay. [y/N] ").strip().lower() in ("y", "yes")
    if not agreed:
        raise ValueError(f"{line}: {_REMEDY}")


def withdrawn(sweep: Sweep) -> tuple[View, list[Trial]]:
    """Return a view of the sweep that is in the folder, and those of its trials that have begun and are not in `sweep`."""
    if not (sweep.path / "sweep.json").exists():
        return View.here(sweep), []
    old = View.here(Sweep.load(sweep.path))
    sweep.grow()  # after that: workers of the same search choose meanwhile
    now = {trial.signature for trial in sweep.trials}
    gone = [trial for trial in old.sweep.trials if trial.signature not in now]
    return old, [trial for trial in gone if old.result(trial) is not None or old.claims(trial) or old.damage(trial)]


def _shown(view: View, trials: list[Trial]) -> str:
    """Return '4 completed, 1 failed: depth 2, seed 43; ...'."""
    counts = Counter(view.state(trial).name for trial in trials)
    named = "; ".join(f"{trial.name}" for trial in trials[:_NAMED]) + "; ..." * (len(trials) > _NAMED)
    return f"{', '.join(f'{n} {state}' for state, n in counts.items())} ({named})"
