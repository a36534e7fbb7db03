"""From a planned sweep to its jobs: what it will cost, whether Slurm would take it, what is missing, and only then its submission."""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from cnnjepa.runs import RunStatus
from jobs import preflight, snapshot
from jobs.provenance import commit_and_diff
from jobs.queue import Queue, SlurmError, has_slurm
from jobs.quote import Quote, balance, lookup, quote
from jobs.spec import ClusterProfile, Scheduler
from jobs.submit import render
from sweeps import claims
from sweeps.claims import Process
from sweeps.engine.slurm import RacedError, SlurmEngine
from sweeps.engine.submission import Submission, job_prefix
from sweeps.folder import Sweep, TrialState, View
from sweeps.status import counts_line, sweep_status, trial_status
from sweeps.watch import conclude

# What the hours of an epoch follow from.
_SHAPE_KEYS = ("data.name", "data.image_size", "data.train_limit", "encoder", "precision", "method", "global_batch_size")


def same_shape(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether an epoch of two configurations is the same work, predictors and the like apart."""
    pairs = [(lookup(a, key), lookup(b, key)) for key in _SHAPE_KEYS]
    return all((x["name"] == y["name"]) if isinstance(x, dict) and isinstance(y, dict) else x == y for x, y in pairs)


def measured_hours(runs_dir: Path, like: dict[str, Any], cluster: ClusterProfile) -> list[float]:
    """Device-hours an epoch of the completed Slurm runs of that shape under `runs_dir`."""
    devices = cluster.gpus_per_slot or cluster.cores_per_slot
    hours = []
    for file in sorted(runs_dir.glob("*/sweep.json")):
        try:
            view = View(Sweep.load(file.parent))
        except ValueError:
            continue
        for trial in view.sweep.trials:
            result = view.result(trial)
            past = view.claims(trial) if result and result.status is RunStatus.completed else []
            if result and past and past[-1].slurm is not None and same_shape(trial.values, like):
                hours.append(result.seconds / 3600 / trial.epochs * devices)
    return hours


def quote_of(view: View, cluster: ClusterProfile, retry_failed: bool) -> Quote:
    """What is left of the sweep, priced; with what failed, where that is to be tried again."""
    trials = view.sweep.trials
    over = {TrialState.completed} if retry_failed else {TrialState.completed, TrialState.failed}
    left = [t.epochs * (1 - trial_status(view, t)["done"]) for t in trials if view.state(t) not in over]
    measured = measured_hours(view.sweep.path.parent, trials[0].values, cluster)
    epochs = statistics.fmean(t.epochs for t in trials)
    return quote(cluster, trials[0].values, left, epochs, measured)


def check_cap(cap: float | None, price: Quote) -> None:
    """Raise ValueError where the quote is above `cap` GPU-hours, or where it cannot be known."""
    if cap is None or price.unit != "GPU-hours" or not price.trials:
        return
    if price.device_hours is None:
        raise ValueError(f"--max-gpu-hours must be held against a quote; got {cap:g}, and the cost is unknown: {price.source}")
    if price.device_hours > cap:
        raise ValueError(f"--max-gpu-hours must be at least the quote of {price.device_hours:,.0f} GPU-hours; got {cap:g}")


def show_quote(price: Quote, console: Console) -> None:
    """Print the quote, and the site's balance beside it."""
    for line in price.lines():
        console.print(line, highlight=False, soft_wrap=True)
    if has := balance():
        console.print(f"sbalance:\n{has}", highlight=False, soft_wrap=True)


def first_submission(sweep: Sweep, cluster: ClusterProfile, slots: int) -> Submission:
    """The submission that would be made next, were there none queued."""
    number = max((s.number for s in Submission.all_of(sweep)), default=0) + 1
    code = sweep.path / "code" / snapshot.digest()
    throttle = min(cluster.max_parallel or slots, slots)
    return Submission(
        sweep.path, number, f"{job_prefix(sweep)}{number:04d}", slots, throttle, [], cluster, str(code), Process.me(), time.time()
    )


def dry_run(sweep: Sweep, cluster: ClusterProfile, price: Quote, console: Console) -> None:
    """Print the trials and where they stand, and on Slurm the quote and the very script; writes nothing, and needs no Slurm."""
    view = View.here(sweep)
    announce_changes(sweep, console)
    for trial in sweep.trials:
        console.print(f"{trial.signature}  {view.state(trial).name:11}  seed {trial.seed}  {trial.setting}", highlight=False)
    console.print(f"{len(sweep.trials)} trials, {sweep.trials[0].epochs} epochs each, in {sweep.path}", soft_wrap=True)
    if cluster.scheduler is not Scheduler.slurm:
        return
    slots = sum(not view.state(t).ended for t in sweep.trials)
    show_quote(price, console)
    if slots:
        wanted = first_submission(sweep, cluster, slots)
        console.print(f"\nbatch script of {slots} slots, {wanted.throttle} at once:\n", highlight=False)
        console.out(render(cluster, wanted.array()), highlight=False)


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
            what = f"withdrawn, but its job goes on to its end; to stop it: scancel {last.slurm.job}"
            console.print(f"  {before[signature].setting}, seed {before[signature].seed}: {what}", highlight=False, soft_wrap=True)
    return True


def take_up(view: View, retry_failed: bool) -> None:
    """What was cancelled until now may run again; where asked, what failed too."""
    for trial in view.sweep.trials:
        state = view.state(trial)
        if state is TrialState.failed and retry_failed:
            view.sweep.run(trial).set_failure_aside()
        if state is TrialState.cancelled or (state is TrialState.failed and retry_failed):
            claims.uncancel(view.sweep.trial_dir(trial))


def refuse_problems(sweep: Sweep, cluster: ClusterProfile, slots: int, console: Console) -> None:
    """Preflight; raises ValueError where anything would stop the submission, warnings are printed."""
    by_data = {str(t.values["data"]): t for t in sweep.trials}
    array = first_submission(sweep, cluster, slots).array()
    data = [t.values["data"] for t in by_data.values()]
    room = preflight.bytes_of_a_run(sweep.trials[0].config)
    found = preflight.preflight(cluster, array, sweep.path.parent, slots, room, data)
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


def run(sweep: Sweep, cluster: ClusterProfile, asked: argparse.Namespace, console: Console) -> int:
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
    if asked.retry_failed or not all(s.ended for s in view.states().values()):
        say(f"{sweep.path}: {counts_line(sweep_status(view))}")
        try:
            submit_missing(sweep, cluster, asked, queue, console)
        except SlurmError as error:
            raise ValueError(f"Slurm must take the jobs; got {error}") from error
        except KeyboardInterrupt:
            return 130
    else:
        sweep.write()
    if all(s.ended for s in View(sweep).states().values()):
        return conclude(View(sweep), console)
    if asked.detach:
        say(f"the jobs need nobody; python -m sweeps status|logs|cancel {sweep.path}")
        return 0
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "sweeps.watch", str(sweep.path)])


def submit_missing(sweep: Sweep, cluster: ClusterProfile, asked: argparse.Namespace, queue: Queue, console: Console) -> None:
    """Check, quote, ask, and submit the slots that the sweep lacks; too many waiting ones are withdrawn."""
    engine = SlurmEngine(sweep, cluster, sweep.path / "code" / snapshot.digest(), queue)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    engine.settle(say)
    view = View(sweep, queue=queue)
    open_trials = sum(not s.ended for s in view.states().values())
    if asked.retry_failed:
        open_trials = len(sweep.trials) - sum(s.name == "completed" for s in view.states().values())
    slots = open_trials - engine.serving(view)
    if slots > 0:
        show_quote(quote_of(view, cluster, asked.retry_failed), console)
        refuse_problems(sweep, cluster, slots, console)
        if not confirmed(asked):
            raise KeyboardInterrupt
    sweep.write()
    for trial in sweep.trials:
        sweep.run(trial).prepare(trial.config)
    engine.code = snapshot.take(sweep.path / "code", commit_and_diff())  # as it is now: a question may have stood for an hour
    take_up(View(sweep, queue=queue), asked.retry_failed)
    while True:
        missing = engine.missing(View(sweep, queue=queue))
        if missing < 0 and (gone := engine.withdraw(-missing)):
            say(f"{gone} waiting slots withdrawn, no trial is left for them")
        try:
            for made in engine.submit(missing) if missing > 0 else []:
                after = f", after {', '.join(made.after)}" if made.after else ""
                say(f"submitted job {made.job}: {made.slots} slots, {made.throttle} at once{after}")
            return
        except RacedError:  # another command has submitted meanwhile: look again
            engine.settle(say)
