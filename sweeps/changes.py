"""What a command changes of a sweep that is there already: trials that came or went, and what it takes up again."""

import os

from rich.console import Console

from cnnjepa.runs import RunStatus
from sweeps import claims
from sweeps.folder import Sweep, TrialState, View
from sweeps.spec import Trial


def left_to_run(view: View, retry_failed: bool) -> list[Trial]:
    """The trials that a command would run: those without a result, and those whose result `take_up` will set aside."""
    again = set_aside(view.sweep, retry_failed)
    return [t for t in view.sweep.trials if not (state := view.state(t)).ended or state in again]


def set_aside(sweep: Sweep, retry_failed: bool) -> set[TrialState]:
    """What has ended and shall go on: what failed where that is asked for, what was pruned where nothing is pruned any more."""
    pruned = set() if sweep.rungs else {TrialState.pruned}
    return pruned | ({TrialState.failed} if retry_failed else set())


def announce_changes(sweep: Sweep, console: Console) -> bool:
    """Say what differs from the sweep that the folder held before; whether anything does."""
    if not (sweep.path / "sweep.json").exists():
        return False
    before, now = ({t.signature: t for t in s.trials} for s in (Sweep.load(sweep.path), sweep))
    if before.keys() == now.keys():
        return False
    added, gone = len(now.keys() - before.keys()), before.keys() - now.keys()
    kept = f"{len(gone)} withdrawn (their folders stay, they leave the tables)"
    console.print(f"the sweep has changed since it was last run: {added} trials added, {kept}", soft_wrap=True)
    old = View.here(Sweep.load(sweep.path))
    for signature in sorted(gone):
        last = next(iter(old.claims(before[signature])[-1:]), None)
        if last is not None and last.slurm is not None and not old.state(before[signature]).settled:
            stop = f"scancel {last.slurm.job}, which ends the trials beside it too" if last.slurm.shared else f"scancel {last.slurm.job}"
            what = f"withdrawn, but its job goes on to its end; to stop it: {stop}"
            console.print(f"  {before[signature].setting}, seed {before[signature].seed}: {what}", highlight=False, soft_wrap=True)
    return True


def take_up(view: View, retry_failed: bool) -> None:
    """What was cancelled until now may run again; where asked, what failed too."""
    view.sweep.uncancel()
    for trial in view.sweep.trials:
        state = view.state(trial)
        if state in set_aside(view.sweep, retry_failed):
            view.sweep.run(trial).set_aside(RunStatus[state.name])
        if state is TrialState.cancelled or (state is TrialState.failed and retry_failed):
            claims.uncancel(view.sweep.trial_dir(trial))
    if view.sweep.search is not None:
        os.utime(view.sweep.path / "sweep.json")  # slots that run read anew what was set aside
