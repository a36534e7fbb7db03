"""The door of every sweep: `python sweeps/<name>.py --cluster local ...` plans, checks, runs what is missing, and writes the results."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from cnnjepa.config import validate
from cnnjepa.identity import from_dict
from jobs.compose import cluster_names, compose_job, qualified
from jobs.door import INTERRUPTED, require_writable
from jobs.queue import SlurmError
from jobs.run import check_job
from jobs.spec import ClusterProfile, JobSpec, Scheduler
from sweeps import claims, on_slurm
from sweeps.changes import announce_changes, left_to_run, take_up
from sweeps.engine.local import LocalEngine, slots_here
from sweeps.engine.rounds import REFRESH_SECONDS, run_round
from sweeps.folder import Sweep, View
from sweeps.rungs import DEFAULT_ETA, rung_epochs
from sweeps.search import Outlook, is_over, to_come
from sweeps.space import applied, baseline
from sweeps.spec import FIRST_SEED, Scale, ScaleName, Search, SweepSpec, build_search, build_trials, grid_of
from sweeps.status import counts_line, sweep_status
from sweeps.study import SAMPLERS
from sweeps.watch import Watcher, conclude, wide_console


def parse(spec: SweepSpec, arguments: Sequence[str]) -> argparse.Namespace:
    """The command line of a sweep; argparse exits with 2 at unknown flags."""
    parser = argparse.ArgumentParser(description=spec.question, epilog="Run again to resume: what has a result is not run again.")
    parser.add_argument("--cluster", default="local", help=f"{', '.join(cluster_names())} (default: local)")
    parser.add_argument("--scale", choices=[s.name for s in ScaleName], help="default: smoke on local, paper elsewhere")
    parser.add_argument("--seeds", type=int, help="seeds a setting; default: the sweep's own number for the scale")
    early = f"a run goes on at a rung if it is among the best 1/eta (default: {DEFAULT_ETA}); default: asha for searches, else none"
    parser.add_argument("--early-stopping", choices=["asha", "none"], help=early)
    parser.add_argument("--eta", type=int, default=DEFAULT_ETA, help="of the runs that reach a rung one in so many goes on")
    if spec.space:
        parser.add_argument("--sampler", choices=SAMPLERS, default=SAMPLERS[0], help=f"who chooses settings (default: {SAMPLERS[0]})")
        parser.add_argument("--points", type=int, help="settings to try; default: the sweep's own number for the scale")
        parser.add_argument(
            "--two-objectives", action="store_true", help="search for accuracy and for few GPU-hours; nothing is stopped early"
        )
        budget = "begin no run that could take the search above H (core-hours where no GPU is used)"
        parser.add_argument("--budget-gpu-hours", type=float, metavar="H", help=budget)
    hands = "on Slurm: a job array, one element a trial (default), or one job of N nodes in which Ray places many trials"
    parser.add_argument("--engine", choices=["array", "ray"], help=hands)
    parser.add_argument("--nodes", type=int, metavar="N", help="of the job, with --engine ray")
    share = "trials at once on each, with --engine ray; default: one a GPU, or a core where there are none"
    parser.add_argument("--slots-per-node", type=int, metavar="K", help=share)
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
    runs_dir = (asked.runs_dir or Path(cluster.runs_dir)).resolve()
    if not asked.dry_run:
        require_writable(runs_dir, "--runs-dir" if asked.runs_dir else "runs_dir")
    path, seeds = runs_dir / f"{spec.name}-{scale.name}", asked.seeds or chosen.seeds
    rungs = rungs_of(spec, chosen, asked)
    eta = asked.eta if rungs else 0
    if not spec.space:
        return Sweep.of(
            spec, scale, build_trials(spec, chosen, seeds, asked.cluster, asked.overrides, rungs), path, None, rungs, eta
        ), cluster
    if asked.sampler == "grid":
        spec, path = grid_of(spec, chosen, asked.cluster, asked.overrides), path.with_name(f"{path.name}-grid")
        return Sweep.of(
            spec, scale, build_trials(spec, chosen, seeds, asked.cluster, asked.overrides, rungs), path, None, rungs, eta
        ), cluster
    search = plan_search(spec, chosen, asked, rungs, seeds)
    first = search.trial(0, 0, baseline(search.space, search.base), FIRST_SEED)
    return Sweep.of(spec, scale, [first], path, search, rungs, eta), cluster


def rungs_of(spec: SweepSpec, scale: Scale, asked: argparse.Namespace) -> list[int]:
    """Epochs at which runs are held against each other: none where nothing is stopped early, and none within any run's warm-up."""
    default = "asha" if spec.space and asked.sampler != "grid" and not asked.two_objectives else "none"
    if (asked.early_stopping or default) == "none":
        return []
    if asked.eta < 2:
        raise ValueError(f"--eta must be at least 2; got {asked.eta}")
    train = compose_job([f"cluster={asked.cluster}", *scale.overrides, *asked.overrides]).train
    swept = [d for d in spec.space_at(scale) if d.key == "optimizer.warmup_epochs"]
    given = [float(s.overrides.get("optimizer.warmup_epochs", 0)) for s in spec.settings]
    longest = max([train.optimizer.warmup_epochs, *given, *(max([d.high, *map(float, d.options)]) for d in swept)])
    found = rung_epochs(train.epochs, longest, asked.eta)
    if not found:
        rule = f"leave an epoch between the warm-up of {longest:g} and {train.epochs} / {asked.eta}"
        raise ValueError(f"--early-stopping=asha must {rule}; got none: give more epochs, or --early-stopping none")
    return found


def plan_search(spec: SweepSpec, scale: Scale, asked: argparse.Namespace, rungs: list[int], seeds: int) -> Search:
    """The search that was asked for; raises ValueError where the borders of its space cannot be trained."""
    points, budget = scale.points if asked.points is None else asked.points, asked.budget_gpu_hours
    if points < 1:
        raise ValueError(f"--points must be at least 1; got {points}")
    if budget is not None and not 0 < budget < float("inf"):
        raise ValueError(f"--budget-gpu-hours must be positive and finite; got {budget:g}")
    options = {"points": points, "seeds": seeds, "costs": asked.two_objectives, "budget_hours": budget}
    search = build_search(spec, scale, asked.cluster, asked.overrides, rungs, sampler=asked.sampler, **options)
    start = baseline(search.space, search.base)
    for d in search.space:
        for value in d.options or ((int(d.low), int(d.high)) if d.whole else (d.low, d.high)):
            if d.key in start:
                validate(from_dict(applied(search.base, {**start, d.key: value}, FIRST_SEED)))
    return search


def run_missing(sweep: Sweep, cluster: ClusterProfile, console: Console) -> bool:
    """Run until every trial has ended; False where a signal asked to stop, which saves running trials first."""
    view = View.here(sweep)
    if is_over(view):
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

    def stopped() -> bool:
        return bool(signals)

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    if engine.unused_devices:
        console.print(f"{engine.unused_devices} CUDA devices are not used: cluster.gpus_per_slot=1 gives each trial one")
    console.print(f"{sweep.path}: {counts_line(sweep_status(view))}; {engine.parallel} at once", soft_wrap=True, highlight=False)
    try:
        engine.start()
        with Watcher(view, console) as watcher:
            while not stopped() and not is_over(view):
                if not run_round(view, engine.place, engine.parallel, watcher, stopped):  # the rest runs in another command's slots
                    if (hosts := view.hosts_elsewhere()) != told:
                        told = hosts
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
    slurm, allocation = cluster.scheduler is Scheduler.slurm, on_slurm.allocation_of(asked, cluster)
    slot = allocation.slot(cluster) if allocation else cluster
    price = on_slurm.quote_of(View.here(sweep), slot, asked.retry_failed) if slurm or asked.max_gpu_hours is not None else None
    if price is not None:
        on_slurm.check_cap(asked.max_gpu_hours, price)
    if asked.dry_run:
        show_plan(sweep, console)
        if slurm and price is not None:
            on_slurm.show_script(sweep, cluster, allocation, price, console)
        return 0
    if slurm and price is not None:
        return on_slurm.run(sweep, cluster, allocation, price, asked, console)
    if left_to_run(View(sweep), asked.retry_failed) or to_come(View(sweep)):
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
        console.print(
            f"{trial.signature}  {view.state(trial).name:11}  seed {trial.seed}  {trial.setting}", highlight=False, soft_wrap=True
        )
    console.print(f"{len(sweep.trials)} trials, {sweep.trials[0].epochs} epochs each, in {sweep.path}", soft_wrap=True)
    if sweep.rungs:
        console.print(f"at epochs {', '.join(map(str, sweep.rungs))} the best 1/{sweep.eta} of the runs go on", highlight=False)
    if (search := sweep.search) is not None:
        more = Outlook(view).runs_left_at_most
        what = f"{search.sampler} chooses up to {search.points} settings, the best of them get up to {search.seeds} seeds"
        console.print(f"{what}: at most {more} further runs", highlight=False, soft_wrap=True)


def main(spec: SweepSpec) -> None:
    """Run `spec` by the process's command line and exit: 0 all completed, 1 some failed, 2 wrong usage, 130 stopped."""
    try:
        sys.exit(run(spec, sys.argv[1:]))
    except (ValueError, SlurmError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
