"""Apply a command to an existing sweep: trials that came or went, and what runs again."""

import os

from rich.console import Console

from cnnjepa.run.folder import RunStatus
from sweeps.search.warnings import pruned_for
from sweeps.spec.sweep import Trial
from sweeps.state import claims
from sweeps.state.folder import Sweep, TrialState, View


def left_to_run(view: View, retry_failed: bool) -> list[Trial]:
    """Return the unfinished trials, and those that `take_up` will set aside to run again."""
    return [t for t in view.sweep.trials if not view.state(t).ended or is_set_aside(view, t, retry_failed)]


def is_set_aside(view: View, trial: Trial, retry_failed: bool) -> bool:
    """Return whether an ended trial shall run again.

    A failed trial does if `retry_failed` is set, a pruned one if the sweep no longer prunes for
    that reason.
    """
    state, result, sweep = view.state(trial), view.result(trial), view.sweep
    if result is None or state is not TrialState.pruned:
        return retry_failed and state is TrialState.failed
    warning = pruned_for(result.cause)
    return warning not in sweep.prune_on if warning else not sweep.rungs


def announce_changes(sweep: Sweep, console: Console) -> bool:
    """Print how the sweep differs from the one in the folder; return whether it does."""
    if not (sweep.path / "sweep.json").exists():
        return False
    before, now = ({t.signature: t for t in s.trials} for s in (Sweep.load(sweep.path), sweep))
    if before.keys() == now.keys():
        return False
    added, gone = len(now.keys() - before.keys()), before.keys() - now.keys()
    kept = f"{len(gone)} withdrawn (no longer in the tables; their folders stay)"
    console.print(f"the sweep has changed since it was last run: {added} trials added, {kept}", soft_wrap=True)
    old = View.here(Sweep.load(sweep.path))
    for signature in sorted(gone):
        last = next(iter(old.claims(before[signature])[-1:]), None)
        if last is not None and last.slurm is not None and not old.state(before[signature]).settled:
            stop = f"scancel {last.slurm.job}{', which also ends the other trials of that job' * last.slurm.shared}"
            what = f"withdrawn, but its job runs to its end; to stop it: {stop}"
            console.print(f"  {before[signature].label}, seed {before[signature].seed}: {what}", highlight=False, soft_wrap=True)
    return True


def take_up(view: View, retry_failed: bool) -> None:
    """Let cancelled trials run again, and failed ones if `retry_failed` is set."""
    view.sweep.uncancel()
    for trial in view.sweep.trials:
        state = view.state(trial)
        if is_set_aside(view, trial, retry_failed):
            view.sweep.run(trial).set_aside(RunStatus[state.name])
        if state is TrialState.cancelled or (state is TrialState.failed and retry_failed):
            claims.uncancel(view.sweep.trial_dir(trial))
    if view.sweep.search is not None:
        os.utime(view.sweep.path / "sweep.json")  # running workers then reread the results
