"""The command of every sweep: `python sweeps/<name>.py --cluster local ...` plans, checks, runs what is missing, and writes the results."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

from rich.console import Console

from jobs.cli import INTERRUPTED
from jobs.cluster import ClusterProfile, JobSpec, Scheduler
from jobs.run import check_jobs
from jobs.slurm.queue import SlurmError
from sweeps.cli import submit
from sweeps.cli.plan import parse, plan
from sweeps.execution.changes import announce_changes, left_to_run, take_up
from sweeps.execution.monitor import Watcher, conclude, wide_console
from sweeps.execution.ray_local import LocalEngine, workers_here
from sweeps.execution.rounds import REFRESH_SECONDS, run_round
from sweeps.report.status import counts_line, sweep_status
from sweeps.search.search import Outlook, is_over, to_take_up
from sweeps.spec.sweep import SweepSpec
from sweeps.state import claims
from sweeps.state.folder import Sweep, View
from sweeps.state.history import note_command


def run_missing(sweep: Sweep, cluster: ClusterProfile, console: Console) -> bool:
    """Run until every trial has ended; False where a signal asked to stop, which saves running trials first."""
    view = View.here(sweep)
    if is_over(view):
        return True
    engine = LocalEngine(sweep, cluster)
    signals: list[int] = []
    reported: list[str] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        signals.append(number)
        if len(signals) == 1:
            engine.stop()
            return
        engine.abandon()
        console.show_cursor()
        os._exit(INTERRUPTED)  # a thread waits in Ray, and an ordinary exit would wait for it

    def stopped() -> bool:
        return bool(signals)

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    if engine.unused_devices:
        console.print(f"{engine.unused_devices} CUDA devices are not used: cluster.gpus_per_trial=1 gives each trial one")
    console.print(f"{sweep.path}: {counts_line(sweep_status(view))}; {engine.parallel} at once", soft_wrap=True, highlight=False)
    try:
        engine.start()
        with Watcher(view, console) as watcher:
            while not stopped() and not is_over(view):
                if not run_round(view, engine.place, engine.parallel, watcher, stopped):  # the rest runs in another command's workers
                    if (hosts := view.hosts_elsewhere()) != reported:
                        reported = hosts
                        minutes = claims.SILENCE_SECONDS / 60
                        if hosts:
                            console.print(f"waiting for trials of {', '.join(hosts)}; taken over once silent for {minutes:.0f} min")
                    watcher.show()
                    time.sleep(REFRESH_SECONDS)
    finally:
        engine.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return not signals


def run_here(sweep: Sweep, cluster: ClusterProfile, console: Console) -> int:
    """Run what is missing on this machine, to the table; returns the exit status."""
    finished = run_missing(sweep, cluster, console)
    view = View.here(sweep)
    if finished and all(s.ended for s in view.states().values()):  # nothing was cancelled
        return conclude(view, console)
    console.print(f"stopped: {counts_line(sweep_status(view))}; the same command resumes", soft_wrap=True, highlight=False)
    return INTERRUPTED


def run(spec: SweepSpec, arguments: Sequence[str]) -> int:
    """Do what the command line asks; returns the exit status. Raises ValueError before anything has started."""
    asked = parse(spec, arguments)
    console = wide_console()
    sweep, cluster = plan(spec, asked)
    slurm, allocation = cluster.scheduler is Scheduler.slurm, submit.allocation_of(asked, cluster)
    worker = allocation.part(cluster) if allocation else cluster
    price = submit.estimate_of(View.here(sweep), worker, asked.retry_failed) if slurm or asked.max_gpu_hours is not None else None
    if price is not None:
        sweep = sweep.expecting(price.device_hours_per_epoch)
        submit.check_budget(sweep, price)
        submit.check_cap(asked.max_gpu_hours, price, submit.budget_of(sweep))
    if asked.dry_run:
        show_plan(sweep, console)
        if slurm and price is not None:
            submit.show_script(sweep, cluster, allocation, price, console)
        return 0
    if slurm and price is not None:
        return submit.run(sweep, cluster, allocation, price, asked, console)
    if left_to_run(View(sweep), asked.retry_failed) or to_take_up(View(sweep)):
        workers_here(cluster)
    check_jobs([JobSpec(trial.config, cluster, sweep.trial_dir(trial)) for trial in sweep.trials])
    announce_changes(sweep, console)
    sweep.write()
    note_command(sweep.path)
    take_up(View.here(sweep), asked.retry_failed)
    return run_here(sweep, cluster, console)


def show_plan(sweep: Sweep, console: Console) -> None:
    """Print the trials and where they stand; writes nothing."""
    view = View.here(sweep)
    announce_changes(sweep, console)
    for trial in sweep.trials:
        console.print(f"{trial.signature}  {view.state(trial).name:11}  seed {trial.seed}  {trial.label}", highlight=False, soft_wrap=True)
    epochs = " or ".join(str(e) for e in sorted({t.epochs for t in sweep.trials}))
    console.print(f"{len(sweep.trials)} trials, {epochs} epochs each, in {sweep.path}", soft_wrap=True)
    if sweep.rungs:
        console.print(f"after epochs {', '.join(map(str, sweep.rungs))} the best 1/{sweep.eta} of the runs go on", highlight=False)
    if (search := sweep.search) is not None:
        more = Outlook(view).runs_left_at_most
        what = f"{search.sampler} chooses up to {search.max_trials} configurations, the best of them get up to {search.seeds} seeds"
        console.print(f"{what}: at most {more} further runs", highlight=False, soft_wrap=True)


def main(spec: SweepSpec) -> None:
    """Run `spec` by the process's command line and exit: 0 all completed, 1 some failed, 2 wrong usage, 130 stopped."""
    try:
        sys.exit(run(spec, sys.argv[1:]))
    except (ValueError, SlurmError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
