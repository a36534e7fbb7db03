"""Run a sweep on this machine: check, plan, run what is missing with Ray Tune, write results."""

import argparse
import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from rich.console import Console

from jobs import snapshot
from jobs.cli import INTERRUPTED, Stop, begun, handling
from jobs.cluster import ClusterProfile, JobSpec
from jobs.provenance import commit_and_diff
from jobs.run import check_jobs
from sweeps.cli.plan import refuse_without_allocation
from sweeps.cli.program import settle
from sweeps.cli.until_decided import next_round
from sweeps.execution.changes import announce_changes, left_to_run, take_up
from sweeps.execution.hung_workers import HungWorkers, end_process
from sweeps.execution.monitor import conclude
from sweeps.execution.phases import saving
from sweeps.execution.ray_local import LocalEngine, workers_here
from sweeps.execution.rounds import REFRESH_SECONDS, run_round
from sweeps.execution.watcher import STARTING_WORKERS, Watcher
from sweeps.report.status import counts_line, nothing_to_run, sweep_status
from sweeps.search.search import is_over, to_take_up
from sweeps.state import claims
from sweeps.state.folder import Sweep
from sweeps.state.history import note_command
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

_SAVE_SECONDS = 60.0  # that runs have to save before the command leaves


def check(asked: argparse.Namespace) -> None:
    """Raise ValueError at an option that needs a Slurm cluster."""
    refuse_without_allocation(asked)
    if asked.backend:
        rule = "be left out on this machine, where Ray Tune places the trials"
        raise ValueError(f"--backend must {rule}; got {asked.backend}: give a Slurm --cluster, or leave it out")


def run(sweep: Sweep, cluster: ClusterProfile, asked: argparse.Namespace, console: Console) -> int:
    """Run what is missing; raise ValueError first if the machine lacks room, data or a device."""
    settle(sweep, View.here(sweep), asked, console)
    left = left_to_run(View(sweep), asked.retry_failed)
    more = to_take_up(View(sweep))
    if left or more:
        workers_here(cluster)
    # What a search chooses later needs the same data and device as the trials that it has.
    checked = left or (sweep.trials[:1] if more else [])
    check_jobs([JobSpec(trial.config, cluster, sweep.trial_dir(trial)) for trial in checked])
    announce_changes(sweep, console)
    for line in [] if left or more else nothing_to_run(View(sweep)):
        console.print(line, soft_wrap=True, highlight=False)
    sweep.write()
    note_command(sweep.path, getattr(asked, "words", None))
    code = snapshot.take(sweep.path / "code", commit_and_diff()) if left or more else None
    take_up(View.here(sweep), asked.retry_failed, asked.typed)
    while run_missing(sweep, cluster, console, code, getattr(asked, "embedded", False)):
        view = View.here(sweep)
        if all(s.ended for s in view.states().values()):
            if (further := next_round(sweep, asked, cluster, console)) is None:
                return conclude(view, console)
            sweep = further
            sweep.write()
            continue
        if is_over(view):  # some trial was cancelled
            break
        # Another command runs a failed trial again: wait for that, or run it here.
    view = View.here(sweep)
    console.print(f"stopped: {counts_line(sweep_status(view))}; the same command resumes", soft_wrap=True, highlight=False)
    return INTERRUPTED


def run_missing(sweep: Sweep, cluster: ClusterProfile, console: Console, code: Path | None = None, embedded: bool = False) -> bool:
    """Run the snapshot `code` until every trial has ended; return False if a signal stopped it, after a save.

    With `embedded`, the process belongs to the caller: KeyboardInterrupt is raised again once the runs have saved, and
    RuntimeError where a command would end at once.
    """
    view = View.here(sweep)
    if is_over(view):
        return True
    engine = LocalEngine(sweep, cluster, code)
    stopped = Stop()
    reported: list[str] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        stopped.received.append(number)
        if len(stopped.received) == 1:
            engine.stop()
            return
        leave(INTERRUPTED)

    def leave(status: int) -> None:
        engine.abandon()
        console.show_cursor()
        os._exit(status)  # an ordinary exit would wait for a thread in Ray

    hung = HungWorkers(claims.Process.me().driver, lambda claim: end_process(claim.owner.pid))

    def show() -> None:
        if stopped():
            watcher.enter(saving(view))
        watcher.show()
        for line in hung.look(view):
            watcher.say(line)
        if folder := engine.lost_folder:
            # Ray waits for ever for what was in there. Workers see it too, and save.
            deadline = time.monotonic() + _SAVE_SECONDS
            while time.monotonic() < deadline and TrialState.running in View.here(sweep).states().values():
                time.sleep(REFRESH_SECONDS)
            rule = f"{folder} must stay while trials run; got no such folder: something removed it"
            if embedded:
                engine.abandon(all_children=False)
                raise RuntimeError(f"{rule}; run the sweep again, which resumes them")
            print(f"error: {rule}; type the command again, which resumes them", file=sys.stderr, flush=True)
            leave(1)

    handled = contextlib.nullcontext() if embedded else handling(on_signal, signal.SIGINT, signal.SIGTERM)
    with handled, contextlib.closing(engine):
        if engine.unused_devices:
            console.print(f"{engine.unused_devices} CUDA devices are not used: cluster.gpus_per_trial=1 gives each trial one")
        console.print(f"{sweep.path}: {counts_line(sweep_status(view))}; {engine.parallel} at once", soft_wrap=True, highlight=False)
        if shared := engine.shared_line():
            console.print(shared, soft_wrap=True, highlight=False)
        with Watcher(view, console, engine.parallel) as watcher:
            watcher.enter("starting Ray")
            watcher.show()
            engine.start()
            begun()
            watcher.enter(STARTING_WORKERS)
            while not stopped() and not is_over(view):
                if not run_round(
                    view, engine.place, engine.parallel, show, stopped, engine.stop if embedded else None
                ):  # the rest runs in another command's workers
                    if (hosts := view.hosts_elsewhere()) != reported:
                        reported = hosts
                        minutes = claims.SILENCE_SECONDS / 60
                        if hosts:
                            console.print(f"waiting for trials of {', '.join(hosts)}; taken over after {minutes:.0f} min of silence")
                    show()
                    time.sleep(REFRESH_SECONDS)
    return not stopped()
