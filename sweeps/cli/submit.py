"""From a planned sweep to its jobs: what it will cost, whether Slurm would take it, what is missing, and only then its submission."""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from cnnjepa.run.folder import RunStatus
from jobs import preflight, snapshot
from jobs.cli import INTERRUPTED
from jobs.cluster import Allocation, ClusterProfile, Scheduler
from jobs.cost import Estimate, balance, combined, estimate, same_shape
from jobs.provenance import commit_and_diff
from jobs.slurm.queue import Queue, SlurmError, has_slurm
from jobs.slurm.sbatch import render
from sweeps.execution.changes import announce_changes, left_to_run, take_up
from sweeps.execution.monitor import conclude
from sweeps.execution.slurm_array import RacedError, SlurmEngine, array_limit, shares
from sweeps.report.status import counts_line, sweep_status, trial_status
from sweeps.search.search import Outlook, epochs_expected, is_over, to_take_up
from sweeps.spec.sweep import Trial
from sweeps.state.folder import Sweep, View
from sweeps.state.history import note_command
from sweeps.state.submission import Submission


def hours_of(view: View, like: dict[str, Any], cluster: ClusterProfile) -> list[float]:
    """Device-hours an epoch of one sweep's completed Slurm runs of that shape."""
    hours = []
    for trial in view.sweep.trials:
        result = view.result(trial)
        past = view.claims(trial) if result and result.status is RunStatus.completed else []
        if result and past and past[-1].slurm is not None and same_shape(trial.values, like):
            devices = past[-1].slurm.gpus or cluster.cores_per_trial
            hours.append(result.seconds / 3600 / trial.epochs * devices)
    return hours


def measured_hours(runs_dir: Path, like: dict[str, Any], cluster: ClusterProfile) -> list[float]:
    """Device-hours an epoch of the completed Slurm runs of that shape under `runs_dir`."""
    hours = []
    for file in sorted(runs_dir.glob("*/sweep.json")):
        try:
            hours += hours_of(View(Sweep.load(file.parent)), like, cluster)
        except ValueError:
            continue  # another sweep's broken file is that sweep's affair
    return hours


def kinds_of(sweep: Sweep) -> list[list[Trial]]:
    """The trials by what an epoch of them costs; those of a search are taken to be alike."""
    kinds: list[list[Trial]] = [list(sweep.trials)] if sweep.search is not None else []
    for trial in sweep.trials if sweep.search is None else ():
        alike = next((kind for kind in kinds if same_shape(trial.values, kind[0].values)), None)
        if alike is None:
            kinds.append([trial])
        else:
            alike.append(trial)
    return kinds


def estimate_of(view: View, cluster: ClusterProfile, retry_failed: bool) -> Estimate:
    """What is left of the sweep, priced, each kind of runs by itself; with what failed, where that is to be tried again."""
    search = view.sweep.search
    left = {t.signature: t.epochs * (1 - trial_status(view, t)["done"]) for t in left_to_run(view, retry_failed)}
    estimates = []
    for kind in kinds_of(view.sweep):
        epochs_left = [left[t.signature] for t in kind if t.signature in left]
        if search is not None:  # as if nothing were stopped early
            epochs_left += [float(kind[0].epochs)] * Outlook(view).runs_left_at_most
        measured = measured_hours(view.sweep.path.parent, kind[0].values, cluster)
        epochs = statistics.fmean(t.epochs for t in kind)
        at_most = bool(view.sweep.rungs) or search is not None
        estimates.append(estimate(cluster, kind[0].values, epochs_left, epochs, measured, at_most=at_most))
    return combined(estimates, cluster)


def budget_of(sweep: Sweep) -> float | None:
    """Device-hours above which a search begins nothing; None without a budget."""
    return sweep.search.budget_hours if sweep.search is not None else None


def check_budget(sweep: Sweep, price: Estimate) -> None:
    """Raise ValueError where a search's budget is not enough for one run."""
    budget, rate = budget_of(sweep), price.device_hours_per_epoch
    if budget is not None and rate is not None and budget < rate * sweep.trials[0].epochs:
        cost = rate * sweep.trials[0].epochs
        raise ValueError(f"--budget-gpu-hours must be at least the {cost:,.1f} {price.unit} of one run; got {budget:g}")


def check_cap(cap: float | None, price: Estimate, budget: float | None = None) -> None:
    """Raise ValueError where the cost estimate, or a search's smaller budget, is above `cap` GPU-hours, or where it cannot be known."""
    if cap is None or price.unit != "GPU-hours" or not price.trials or (budget is not None and budget <= cap):
        return
    if price.device_hours is None:
        raise ValueError(f"--max-gpu-hours must be compared with an estimate; got {cap:g}, and the cost is unknown: {price.source}")
    if price.device_hours > cap:
        raise ValueError(f"--max-gpu-hours must be at least the cost estimate of {price.device_hours:,.0f} GPU-hours; got {cap:g}")


def show_estimate(sweep: Sweep, price: Estimate, console: Console) -> None:
    """Print the cost estimate, and the site's balance beside it."""
    for line in price.lines():
        console.print(line, highlight=False, soft_wrap=True)
    if sweep.rungs and sweep.search is not None and (rate := price.device_hours_per_epoch) is not None:
        hours = rate * epochs_expected(Outlook(View(sweep)))
        console.print(f"  about {hours:,.0f} of them if one in {sweep.eta} goes on at each rung", highlight=False)
    if (budget := budget_of(sweep)) is not None:
        console.print(f"  the search begins no run that could take it above {budget:g} {price.unit}", highlight=False, soft_wrap=True)
        if price.device_hours_per_epoch is None:
            console.print("  one run tells first what a run costs; for more at once, watch, or run the command again then", highlight=False)
    if has := balance():
        console.print(f"sbalance:\n{has}", highlight=False, soft_wrap=True)


def allocation_of(asked: argparse.Namespace, cluster: ClusterProfile) -> Allocation | None:
    """The allocation that the command line asks for, None for an array; raises ValueError where its parts do not fit."""
    slurm = cluster.scheduler is Scheduler.slurm
    if asked.backend != "allocation" or not slurm:
        for key, value in {"--nodes": asked.nodes, "--trials-per-node": asked.trials_per_node}.items():
            if value is not None:
                raise ValueError(f"{key} must come with --backend allocation on a Slurm cluster; got {value}: add it, or leave {key} out")
    if asked.backend and not slurm:
        rule = "be left out on this machine, where Ray Tune places the trials"
        raise ValueError(f"--backend must {rule}; got {asked.backend}: give a Slurm --cluster, or leave it out")
    if asked.backend != "allocation":
        return None
    if asked.nodes is None:
        raise ValueError("--nodes must be given with --backend allocation; got none: add --nodes N")
    return Allocation.of(cluster, asked.nodes, asked.trials_per_node)


def planned(engine: SlurmEngine, workers: int) -> list[Submission]:
    """The submissions of that many workers that would come next, were nothing queued; all but their sizes is the same."""
    if engine.allocation is not None:
        return [engine.planned(1, 1, [])]
    return [engine.planned(size, throttle, []) for size, throttle in shares(workers, array_limit(), engine.cluster.max_parallel or workers)]


def show_script(sweep: Sweep, cluster: ClusterProfile, allocation: Allocation | None, price: Estimate, console: Console) -> None:
    """Print the cost estimate and the very script that would be submitted were nothing queued; needs no Slurm."""
    engine = SlurmEngine(sweep, cluster, sweep.path / "code" / snapshot.digest(), Queue(), allocation)
    view = View(sweep)
    workers = engine.wanted(len(left_to_run(view, False)) + to_take_up(view) if sweep.search is not None else price.trials)
    show_estimate(sweep, price, console)
    if workers:
        arrays = planned(engine, workers)
        for size, throttle in dict.fromkeys((a.size, a.throttle) for a in arrays):
            alike = [a for a in arrays if (a.size, a.throttle) == (size, throttle)]
            many = f", {len(alike)} such arrays" if len(alike) > 1 else ""
            console.print(f"\nbatch script of {alike[0].what}{many}:\n", highlight=False)
            console.out(render(alike[0].job_profile, alike[0].array()), highlight=False)


def refuse_problems(engine: SlurmEngine, workers: int, runs: int, console: Console) -> None:
    """Preflight, with room for so many runs; raises ValueError where anything would stop the submission, warnings are printed."""
    sweep = engine.sweep
    by_data = {str(sweep.task.value(t.values, "data", "")): t.values for t in sweep.trials}
    room = sweep.task.bytes_of_a_run(sweep.trials[0].config)
    first = planned(engine, workers)[0]
    found = preflight.preflight(first.job_profile, first.array(), sweep.path.parent, runs, room, list(by_data.values()))
    for finding in found:
        if finding.level == "warning" or finding.what == "squota":
            console.print(f"preflight: {finding.what}: {finding.said}", highlight=False, soft_wrap=True)
    problems = [f"{f.what}: {f.said}" for f in found if f.level == "problem"]
    if problems:
        raise ValueError("preflight found what would stop the jobs, nothing was submitted: " + "; ".join(problems))


def confirmed(asked: argparse.Namespace) -> bool:
    """Whether a person at a terminal agrees; a script is not asked."""
    if asked.yes or not sys.stdin.isatty():
        return True
    return input("submit? [y/N] ").strip().lower() in ("y", "yes")


def run(
    sweep: Sweep, cluster: ClusterProfile, allocation: Allocation | None, price: Estimate, asked: argparse.Namespace, console: Console
) -> int:
    """Submit what is missing and become the process that watches; returns the exit status where there is nothing to watch.

    Raises ValueError before anything was submitted.
    """
    if not has_slurm():
        raise ValueError(f"--cluster {cluster.name} must be used where Slurm is installed; got no squeue here: use --dry-run to look at it")
    queue = Queue()
    view = View(sweep, queue=queue)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    announce_changes(sweep, console)
    if left_to_run(view, asked.retry_failed) or to_take_up(view):
        say(f"{sweep.path}: {counts_line(sweep_status(view))}")
        engine = SlurmEngine(sweep, cluster, sweep.path / "code" / snapshot.digest(), queue, allocation)
        if asked.backend is None and engine.allocated:  # who only looks again shall not get an array beside it
            engine.allocation = engine.allocated
            say("an allocation of this sweep is queued or runs; --backend array adds an array beside it")
        try:
            if not submit_missing(engine, price, asked, console, say):
                return INTERRUPTED
        except SlurmError as error:
            raise ValueError(f"Slurm must take the jobs; got {error}") from error
    else:
        sweep.write()
    if is_over(View(sweep)) and all(s.ended for s in View(sweep).states().values()):
        return conclude(View(sweep), console)
    if asked.detach:
        say(f"the jobs need nobody; python -m sweeps status|logs|cancel {sweep.path}")
        return 0
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "sweeps.execution.monitor", str(sweep.path)])  # noqa: S606, no shell is wanted


def submit_missing(engine: SlurmEngine, price: Estimate, asked: argparse.Namespace, console: Console, say: Callable[[str], None]) -> bool:
    """Check, estimate, ask, and submit the workers that the sweep lacks; withdraw spare waiting ones. Return False if a person said no."""
    sweep, queue = engine.sweep, engine.queue
    engine.settle(say)
    view = View(sweep, queue=queue)
    workers = engine.lacking(view, len(left_to_run(view, asked.retry_failed)) + to_take_up(view))
    if workers > 0:
        show_estimate(sweep, price, console)
        refuse_problems(engine, workers, price.trials, console)
        if not confirmed(asked):
            return False
    sweep.write()
    note_command(sweep.path)
    for trial in sweep.trials:
        sweep.run(trial).prepare(trial.config)
    engine.code = snapshot.take(sweep.path / "code", commit_and_diff())  # as it is now: a question may have stood for an hour
    take_up(View(sweep, queue=queue), asked.retry_failed)
    while True:
        engine.queue = Queue()  # asked again: what it said before is older than what other commands have submitted
        missing = engine.missing(View(sweep, queue=engine.queue))
        if missing < 0 and (gone := engine.withdraw(-missing)):
            say(f"{gone} waiting workers withdrawn, no trial is left for them")
        try:
            for made in engine.submit(missing) if missing > 0 else []:
                after = f", after {', '.join(made.after)}" if made.after else ""
                say(f"submitted job {made.job}: {made.what}{after}")
            return True
        except RacedError:  # another command has submitted meanwhile: look again
            engine.settle(say)
