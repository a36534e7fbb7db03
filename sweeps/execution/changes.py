"""Apply a command to an existing sweep: trials that came or went, and what runs again."""

import math
import os

from rich.console import Console

from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunStatus
from sweeps.search.warnings import pruned_for
from sweeps.spec.sweep import Trial
from sweeps.state import claims
from sweeps.state.folder import Sweep
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View


def left_to_run(view: View, retry_failed: bool) -> list[Trial]:
    """Return the unfinished trials, and those that `take_up` will set aside to run again."""
    return [t for t in view.sweep.trials if not view.state(t).ended or is_set_aside(view, t, retry_failed)]


def is_set_aside(view: View, trial: Trial, retry_failed: bool) -> bool:
    """Return whether an ended trial is to run again.

    A failed trial does if `retry_failed` is set, and a completed one of which a probe has no value:
    with its final checkpoint there, only the probes run. A pruned one does if the sweep no longer
    prunes for that reason.
    """
    state, result, sweep = view.state(trial), view.result(trial), view.sweep
    if result is not None and state is TrialState.completed:
        return retry_failed and bool(result.missing) and is_final_there(view, trial, result.step)
    if result is None or state is not TrialState.pruned:
        return retry_failed and state is TrialState.failed
    warning = pruned_for(result.cause)
    return warning not in sweep.prune_on if warning else not sweep.rungs


def is_final_there(view: View, trial: Trial, step: int) -> bool:
    """Return whether the trial has a checkpoint of its last step; without, it would train again."""
    return any(found.step == step for found in checkpoint.find(view.sweep.run(trial).checkpoints))


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
            console.print(f"  {before[signature].name}: {what}", highlight=False, soft_wrap=True)
    return True


def take_up(view: View, retry_failed: bool, typed: float = math.inf) -> None:
    """Let cancelled trials run again, and if `retry_failed` is set what failed or lacks a score.

    What ended after the command was typed, in seconds since the Unix epoch, is another command's
    retry, and does not run once more.
    """
    view.sweep.uncancel()
    for trial in view.sweep.trials:
        state, again = view.state(trial), is_set_aside(view, trial, retry_failed)
        again = again and (state is TrialState.pruned or view.sweep.run(trial).ended_at() < typed)
        if again:
            view.sweep.run(trial).set_aside(RunStatus[state.name])
        if state is TrialState.cancelled or (again and state is not TrialState.pruned):
            claims.uncancel(view.sweep.trial_dir(trial))
    if view.sweep.search is not None:
        os.utime(view.sweep.path / "sweep.json")  # running workers then reread the results
