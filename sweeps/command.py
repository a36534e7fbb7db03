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
from rich.live import Live

from jobs.compose import cluster_names, compose_job
from jobs.run import INTERRUPTED, check_job, require_writable
from jobs.spec import ClusterProfile, JobSpec
from sweeps import claims, results
from sweeps.engine.local import LocalEngine, slots_here
from sweeps.folder import Sweep, TrialState, View
from sweeps.spec import ScaleName, SweepSpec, build_trials
from sweeps.status import counts_line, live_table, sweep_status

_REFRESH_SECONDS = 1.0
_PLAIN_LINE_SECONDS = 30.0


def parse(spec: SweepSpec, arguments: Sequence[str]) -> argparse.Namespace:
    """The command line of a sweep; argparse exits with 2 at unknown flags."""
    parser = argparse.ArgumentParser(description=spec.question, epilog="Run again to resume: what has a result is not run again.")
    parser.add_argument("--cluster", default="local", help=f"{', '.join(cluster_names())} (default: local)")
    parser.add_argument("--scale", choices=[s.name for s in ScaleName], help="default: smoke on local, paper elsewhere")
    parser.add_argument("--seeds", type=int, help="seeds a setting; default: the sweep's own number for the scale")
    parser.add_argument("--runs-dir", type=Path, help="where sweeps are kept; default: the cluster profile's")
    parser.add_argument("--dry-run", action="store_true", help="list the trials and where they stand, and run nothing")
    parser.add_argument("--retry-failed", action="store_true", help="run failed trials again, from their last checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every trial, such as epochs=5")
    return parser.parse_args(arguments)


def plan(spec: SweepSpec, asked: argparse.Namespace) -> tuple[Sweep, ClusterProfile]:
    """The sweep that was asked for, checked through and through; nothing has started. Raises ValueError at the first broken rule."""
    if asked.seeds is not None and asked.seeds < 1:
        raise ValueError(f"--seeds must be at least 1; got {asked.seeds}")
    scale = ScaleName[asked.scale] if asked.scale else ScaleName.smoke if asked.cluster == "local" else ScaleName.paper
    chosen = spec.scale(scale)
    cluster = compose_job([f"cluster={asked.cluster}", *chosen.overrides, *asked.overrides]).cluster
    trials = build_trials(spec, chosen, asked.seeds or chosen.seeds, asked.cluster, asked.overrides)
    runs_dir = (asked.runs_dir or Path(cluster.runs_dir)).resolve()
    if not asked.dry_run:
        require_writable(runs_dir, "--runs-dir" if asked.runs_dir else "runs_dir")
    sweep = Sweep.of(spec, scale, trials, runs_dir / f"{spec.name}-{scale.name}")
    return sweep, cluster


def wide_console() -> Console:
    """The terminal, or a file or pipe as wide as the tables need."""
    console = Console(file=sys.stdout)
    return console if console.is_terminal else Console(file=sys.stdout, width=150)


def announce_changes(sweep: Sweep, console: Console) -> None:
    """Say what differs from the sweep that the folder held before."""
    if not (sweep.path / "sweep.json").exists():
        return
    before, now = ({t.signature for t in s.trials} for s in (Sweep.load(sweep.path), sweep))
    if before != now:
        kept = f"{len(before - now)} withdrawn (their folders stay, they leave the tables)"
        console.print(f"the sweep has changed since it was last run: {len(now - before)} trials added, {kept}")


class Watcher:
    """Shows where the sweep stands: a live table on a terminal, else a line now and then."""

    def __init__(self, view: View, console: Console) -> None:
        self.view, self.console = view, console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._started = time.monotonic()
        self._first_done: float | None = None
        self._printed = (float("-inf"), "")

    def __enter__(self) -> "Watcher":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self) -> None:
        """Look at the run folders and refresh what is shown."""
        status = sweep_status(self.view)
        done = sum(t["done"] if t["state"] != "failed" else 1.0 for t in status["trials"])
        if self._first_done is None:
            self._first_done = done
        gained, minutes = done - self._first_done, (time.monotonic() - self._started) / 60
        left = minutes * (len(status["trials"]) - done) / gained if gained > 0.5 else None
        if self._live:
            self._live.update(live_table(status, left), refresh=True)
            return
        line, (when, before) = counts_line(status), self._printed
        if line != before or time.monotonic() - when > _PLAIN_LINE_SECONDS:
            running = ", ".join(
                f"{t['setting']} seed {t['seed']} {100 * t['done']:.0f} %" for t in status["trials"] if t["state"] == "running"
            )
            tail = f", about {left:.0f} min left" if left is not None else ""
            self.console.print(f"{line}{tail}" + (f": {running}" if running else ""), highlight=False, soft_wrap=True)
            self._printed = time.monotonic(), line


def run_missing(sweep: Sweep, cluster: ClusterProfile, console: Console) -> bool:
    """Run until every trial has ended; False where a signal asked to stop, which saves running trials first."""
    view = View(sweep)
    if all(s.ended for s in view.states().values()):
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
            while not signals and not all(s.ended for s in view.states().values()):
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


def progress_made(view: View) -> tuple[int, int]:
    """How often trials were begun or taken over, and how many have ended: a round of slots that changes neither never will."""
    begun = sum(len(claims.history(view.sweep.trial_dir(t))) for t in view.sweep.trials)
    return begun, sum(s.ended for s in view.states().values())


def watch_while(work: Callable[[], list[str]], watcher: Watcher) -> list[str]:
    """What `work` returns, run in a thread while the sweep is shown; what it raises is raised here."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while not wait([future], _REFRESH_SECONDS).done:
            watcher.show()
        watcher.show()
        return future.result()


def conclude(view: View, console: Console) -> int:
    """Write and show the results; returns 0 where every trial completed with a value, else 1, each failure named with its cause."""
    paths = results.write_all(view)
    console.print(results.terminal_table(view))
    bad = [r for r in results.rows(view) if r.state is TrialState.failed or (r.state is TrialState.completed and r.cause)]
    for row in bad:
        console.print(f"{row.setting}, seed {row.seed}: {row.state.name}: {row.cause}", highlight=False, soft_wrap=True)
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)
    return 1 if bad else 0


def run(spec: SweepSpec, arguments: Sequence[str]) -> int:
    """Do what the command line asks; returns the exit status. Raises ValueError before anything has started."""
    asked = parse(spec, arguments)
    console = wide_console()
    sweep, cluster = plan(spec, asked)
    if asked.dry_run:
        view = View(sweep)
        for trial in sweep.trials:
            console.print(f"{trial.signature}  {view.state(trial).name:11}  seed {trial.seed}  {trial.setting}", highlight=False)
        console.print(f"{len(sweep.trials)} trials, {sweep.trials[0].config.epochs} epochs each, in {sweep.path}", soft_wrap=True)
        return 0
    if not all(s.ended for s in View(sweep).states().values()):
        slots_here(cluster)
    splits = None
    for trial in sweep.trials:
        splits = check_job(JobSpec(trial.config, cluster, sweep.trial_dir(trial)), splits=splits)
    announce_changes(sweep, console)
    sweep.write()
    if asked.retry_failed:
        for trial in sweep.trials:
            sweep.run(trial).set_failure_aside()
    finished = run_missing(sweep, cluster, console)
    view = View(sweep)
    if not finished:
        console.print(f"stopped: {counts_line(sweep_status(view))}; the same command resumes", soft_wrap=True, highlight=False)
        return INTERRUPTED
    return conclude(view, console)


def main(spec: SweepSpec) -> None:
    """Run `spec` by the process's command line and exit: 0 all completed, 1 some failed, 2 wrong usage, 130 stopped."""
    try:
        sys.exit(run(spec, sys.argv[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
