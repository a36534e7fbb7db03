"""The door of every sweep: `python sweeps/<name>.py --cluster local ...` plans, checks, runs what is missing, and writes the results."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import FrameType

from rich.console import Console

from jobs.compose import cluster_names, compose_job, qualified
from jobs.door import INTERRUPTED, require_writable
from jobs.queue import SlurmError
from jobs.run import check_job
from jobs.spec import ClusterProfile, JobSpec, Scheduler
from sweeps import claims, on_slurm
from sweeps.changes import announce_changes, take_up
from sweeps.engine.local import LocalEngine, slots_here
from sweeps.folder import Sweep, TrialState, View
from sweeps.spec import ScaleName, SweepSpec, build_trials
from sweeps.status import counts_line, sweep_status
from sweeps.watch import Watcher, conclude, progress_made, wide_console

_REFRESH_SECONDS = 1.0


def parse(spec: SweepSpec, arguments: Sequence[str]) -> argparse.Namespace:
    """The command line of a sweep; argparse exits with 2 at unknown flags."""
    parser = argparse.ArgumentParser(description=spec.question, epilog="Run again to resume: what has a result is not run again.")
    parser.add_argument("--cluster", default="local", help=f"{', '.join(cluster_names())} (default: local)")
    parser.add_argument("--scale", choices=[s.name for s in ScaleName], help="default: smoke on local, paper elsewhere")
    parser.add_argument("--seeds", type=int, help="seeds a setting; default: the sweep's own number for the scale")
    parser.add_argument("--runs-dir", type=Path, help="where sweeps are kept; default: the cluster profile's")
    parser.add_argument("--dry-run", action="store_true", help="show trials, quote and batch script, and run nothing; needs no Slurm")
    parser.add_argument("--max-gpu-hours", type=float, metavar="H", help="refuse to submit what is quoted above H")
    parser.add_argument("--yes", action="store_true", help="ask nothing")
    parser.add_argument("--detach", action="store_true", help="on Slurm: submit and return; the jobs need nobody")
    parser.add_argument("--retry-failed", action="store_true", help="run failed trials again, from their last checkpoint")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for every trial, such as epochs=5; or of the profile, such as account=abc"
    )
    return parser.parse_args(arguments)


def profile_keys(overrides: Sequence[str]) -> list[str]:
    """Those of `overrides` that are the cluster profile's."""
    return [o for o in qualified(overrides) if o.startswith("cluster.")]


def plan(spec: SweepSpec, asked: argparse.Namespace) -> tuple[Sweep, ClusterProfile]:
    """The sweep that was asked for, checked through and through; nothing has started. Raises ValueError at the first broken rule."""
    if asked.seeds is not None and asked.seeds < 1:
        raise ValueError(f"--seeds must be at least 1; got {asked.seeds}")
    local = compose_job([f"cluster={asked.cluster}", *profile_keys(asked.overrides)]).cluster.scheduler is Scheduler.local
    scale = ScaleName[asked.scale] if asked.scale else ScaleName.smoke if local else ScaleName.paper
    chosen = spec.scale(scale)
    cluster = compose_job([f"cluster={asked.cluster}", *chosen.overrides, *asked.overrides]).cluster
    trials = build_trials(spec, chosen, asked.seeds or chosen.seeds, asked.cluster, asked.overrides)
    runs_dir = (asked.runs_dir or Path(cluster.runs_dir)).resolve()
    if not asked.dry_run:
        require_writable(runs_dir, "--runs-dir" if asked.runs_dir else "runs_dir")
    sweep = Sweep.of(spec, scale, trials, runs_dir / f"{spec.name}-{scale.name}")
    return sweep, cluster


def run_missing(sweep: Sweep, cluster: ClusterProfile, console: Console) -> bool:
    """Run until every trial has ended; False where a signal asked to stop, which saves running trials first."""
    view = View.here(sweep)
    if all(s.settled for s in view.states().values()):
        return True
    engine = LocalEngine(sweep, cluster)
    signals: list[int] = []
    told: list[str] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        signals.append(number)
        if len(signals) == 1:
            engine.stop()
            return
        engine.abandon()
        console.show_cursor()
        os._exit(INTERRUPTED)  # a thread waits in Ray, and an ordinary exit would wait for it

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    if engine.unused_devices:
        console.print(f"{engine.unused_devices} CUDA devices are not used: cluster.gpus_per_slot=1 gives each trial one")
    console.print(f"{sweep.path}: {counts_line(sweep_status(view))}; {engine.parallel} at once", soft_wrap=True, highlight=False)
    try:
        engine.start()
        with Watcher(view, console) as watcher:
            while not signals and not all(s.settled for s in view.states().values()):
                ours = [s for s in view.states().values() if s in (TrialState.waiting, TrialState.interrupted)]
                if ours:
                    before_round = progress_made(view)
                    errors = watch_while(partial(engine.place, len(ours), view.watch.silent), watcher)
                    if not signals and progress_made(view) == before_round:
                        raise RuntimeError(f"slots end before they claim a trial: {(errors or ['without an error'])[0]}")
                else:  # the rest runs in another command's slots
                    if (hosts := view.hosts_elsewhere()) != told:
                        told = hosts
                        minutes = claims.SILENCE_SECONDS / 60
                        if hosts:
                            console.print(f"waiting for trials of {', '.join(hosts)}; taken over once silent for {minutes:.0f} min")
                    watcher.show()
                    time.sleep(_REFRESH_SECONDS)
    finally:
        engine.close()
        for number, handler in before.items():
            signal.signal(number, handler)
    return not signals


def watch_while(work: Callable[[], list[str]], watcher: Watcher) -> list[str]:
    """What `work` returns, run in a thread while the sweep is shown; what it raises is raised here."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while not wait([future], _REFRESH_SECONDS).done:
            watcher.show()
        watcher.show()
        return future.result()


def run_here(sweep: Sweep, cluster: ClusterProfile, console: Console) -> int:
    """Run what is missing on this machine, to the table; returns the exit status."""
    finished = run_missing(sweep, cluster, console)
    view = View.here(sweep)
    if finished and all(s.ended for s in view.states().values()):
        return conclude(view, console)
    console.print(f"stopped: {counts_line(sweep_status(view))}; the same command resumes", soft_wrap=True, highlight=False)
    return INTERRUPTED


def run(spec: SweepSpec, arguments: Sequence[str]) -> int:
    """Do what the command line asks; returns the exit status. Raises ValueError before anything has started."""
    asked = parse(spec, arguments)
    console = wide_console()
    sweep, cluster = plan(spec, asked)
    slurm = cluster.scheduler is Scheduler.slurm
    price = on_slurm.quote_of(View.here(sweep), cluster, asked.retry_failed) if slurm or asked.max_gpu_hours is not None else None
    if price is not None:
        on_slurm.check_cap(asked.max_gpu_hours, price)
    if asked.dry_run:
        show_plan(sweep, console)
        if slurm and price is not None:
            on_slurm.show_script(sweep, cluster, price, console)
        return 0
    if slurm and price is not None:
        return on_slurm.run(sweep, cluster, price, asked, console)
    if not all(s.ended for s in View(sweep).states().values()):
        slots_here(cluster)
    splits = None
    for trial in sweep.trials:
        splits = check_job(JobSpec(trial.config, cluster, sweep.trial_dir(trial)), splits=splits)
    announce_changes(sweep, console)
    sweep.write()
    take_up(View.here(sweep), asked.retry_failed)
    return run_here(sweep, cluster, console)


def show_plan(sweep: Sweep, console: Console) -> None:
    """Print the trials and where they stand; writes nothing."""
    view = View.here(sweep)
    announce_changes(sweep, console)
    for trial in sweep.trials:
        console.print(f"{trial.signature}  {view.state(trial).name:11}  seed {trial.seed}  {trial.setting}", highlight=False)
    console.print(f"{len(sweep.trials)} trials, {sweep.trials[0].epochs} epochs each, in {sweep.path}", soft_wrap=True)


def main(spec: SweepSpec) -> None:
    """Run `spec` by the process's command line and exit: 0 all completed, 1 some failed, 2 wrong usage, 130 stopped."""
    try:
        sys.exit(run(spec, sys.argv[1:]))
    except (ValueError, SlurmError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
