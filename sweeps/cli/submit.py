"""Submit a planned sweep to Slurm: show the script, run preflight, submit missing workers."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable

from rich.console import Console

from cnnjepa.run.identity import from_dict
from jobs import preflight, snapshot
from jobs.cli import INTERRUPTED, begun
from jobs.cluster import Allocation, ClusterProfile
from jobs.cost import Estimate
from jobs.provenance import commit_and_diff
from jobs.slurm.limits import array_limit, shares
from jobs.slurm.queue import Queue, SlurmError, has_slurm
from jobs.slurm.sbatch import render
from sweeps.cli.estimate import show_estimate
from sweeps.cli.plan import refuse_without_allocation
from sweeps.cli.program import settle
from sweeps.execution.changes import announce_changes, left_to_run, take_up
from sweeps.execution.monitor import conclude
from sweeps.execution.slurm_array import RacedError, SlurmEngine
from sweeps.execution.submitting import QueueFullError
from sweeps.report.status import counts_line, nothing_to_run, sweep_status
from sweeps.search.search import is_over, to_take_up
from sweeps.spec.check import borders
from sweeps.spec.space import applied
from sweeps.spec.sweep import FIRST_SEED
from sweeps.state.folder import Sweep
from sweeps.state.history import note_command
from sweeps.state.submission import Submission, moved_line
from sweeps.state.view import View


def allocation_of(asked: argparse.Namespace, cluster: ClusterProfile) -> Allocation | None:
    """Return the requested allocation, or None for an array; raise ValueError if invalid."""
    if asked.backend != "allocation":
        refuse_without_allocation(asked)
        return None
    if asked.nodes is None:
        raise ValueError("--nodes must be given with --backend allocation; got none: add --nodes N")
    return Allocation.of(cluster, asked.nodes, asked.trials_per_node)


def planned(engine: SlurmEngine, workers: int) -> list[Submission]:
    """Return the next submissions of `workers` workers, as if nothing were queued."""
    limit = array_limit()
    if engine.allocation is not None:
        return [engine.planned(1, int(limit > 1), [])]
    return [engine.planned(size, throttle, []) for size, throttle in shares(workers, limit, engine.cluster.max_parallel or workers)]


def show_script(sweep: Sweep, cluster: ClusterProfile, allocation: Allocation | None, price: Estimate, console: Console) -> None:
    """Print the cost estimate and the exact batch script, as if nothing were queued."""
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


def most_bytes(sweep: Sweep) -> int:
    """Return the most bytes that a run of the sweep keeps on disk, of a search at the bounds of its space."""
    search = sweep.search
    every = [t.values for t in sweep.trials]
    if search is not None:
        every += [applied(search.base, params, FIRST_SEED) for params in borders(search.space, search.base)]
    distinct = {json.dumps({**values, "seed": 0}, sort_keys=True): values for values in every}
    return max(sweep.task.bytes_of_a_run(from_dict(values)) for values in distinct.values())


def refuse_problems(engine: SlurmEngine, workers: int, runs: int, console: Console) -> None:
    """Run preflight for `runs` runs; print warnings and raise ValueError at problems."""
    sweep = engine.sweep
    by_data = {str(sweep.task.value(t.values, "data", "")): t.values for t in sweep.trials}
    room = most_bytes(sweep)
    first = planned(engine, max(engine.fitting(workers), 1))[0]
    found = preflight.preflight(first.job_profile, first.array(), sweep.path.parent, runs, room, list(by_data.values()))
    for finding in found:
        if finding.level == "warning" or finding.what == "squota":
            console.print(f"preflight: {finding.what}: {finding.said}", highlight=False, soft_wrap=True)
    problems = [f"{f.what}: {f.said}" for f in found if f.level == "problem"]
    if problems:
        raise ValueError("preflight found problems, nothing was submitted: " + "; ".join(problems))


def confirmed(asked: argparse.Namespace) -> bool:
    """Return whether a person at a terminal agrees; a script is not asked."""
    if asked.yes or not sys.stdin.isatty():
        return True
    return input("submit? [y/N] ").strip().lower() in ("y", "yes")


def run(
    sweep: Sweep, cluster: ClusterProfile, allocation: Allocation | None, price: Estimate, asked: argparse.Namespace, console: Console
) -> int:
    """Submit what is missing; then become the watching process, or return the exit status."""
    if not has_slurm():
        raise ValueError(f"--cluster {cluster.name} must be used where Slurm is installed; got no squeue here: use --dry-run for a preview")
    queue = Queue()
    view = View(sweep, queue=queue)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    settle(sweep, View(sweep, queue=queue), asked, console)
    announce_changes(sweep, console)
    if moved := moved_line(sweep, queue):
        say(moved)
    if left_to_run(view, asked.retry_failed) or to_take_up(view):
        say(f"{sweep.path}: {counts_line(sweep_status(view))}")
        engine = SlurmEngine(sweep, cluster, sweep.path / "code" / snapshot.digest(), queue, allocation)
        if asked.backend is None and engine.allocated:  # a repeated command must not add an array
            engine.allocation = engine.allocated
            say("an allocation of this sweep is queued or running; --backend array adds an array beside it")
        try:
            if not submit_missing(engine, price, asked, console, say):
                return INTERRUPTED
        except SlurmError as error:
            raise ValueError(f"Slurm must accept the jobs; got {error}") from error
    else:
        for line in nothing_to_run(view):
            say(line)
        sweep.write()
    if is_over(View(sweep)) and all(s.ended for s in View(sweep).states().values()):
        return conclude(View(sweep), console)
    if asked.detach:
        say(f"the jobs run on their own; python -m sweeps status|logs|cancel {shlex.quote(str(sweep.path))}")
        if asked.until_decided is not None:
            say("once they have ended, the same command judges the scores and may submit further seeds")
        return 0
    sys.stdout.flush()
    # With --until-decided the same command follows, which judges the scores and may submit further seeds.
    # As it was typed: a sweep's file may have taken its own words out of sys.argv.
    again = [] if asked.until_decided is None else [sys.executable, *sys.orig_argv[1:], *["--yes"] * (not asked.yes)]
    os.execv(sys.executable, [sys.executable, "-m", "sweeps.execution.monitor", str(sweep.path), *again])  # noqa: S606, no shell is wanted


def submit_missing(engine: SlurmEngine, price: Estimate, asked: argparse.Namespace, console: Console, say: Callable[[str], None]) -> bool:
    """Submit missing workers or withdraw spare ones; return False if a person declines."""
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
    note_command(sweep.path, getattr(asked, "words", None))
    for trial in left_to_run(view, asked.retry_failed):
        sweep.run(trial).prepare(trial.config)
    engine.code = snapshot.take(sweep.path / "code", commit_and_diff())  # the question may have waited for an hour
    take_up(View(sweep, queue=queue), asked.retry_failed, asked.typed)
    while True:
        queue.look_again()  # other commands may have submitted meanwhile
        missing = engine.missing(View(sweep, queue=queue))
        if missing < 0 and (gone := engine.withdraw(-missing)):
            say(f"{gone} waiting workers withdrawn: no trial is left for them")
        if missing <= 0:
            return True
        try:
            arrays = engine.submit(missing)
        except RacedError:  # another command was first: look again
            engine.settle(say)
            continue
        except QueueFullError as error:
            # The jobs that are queued submit the rest. A command that stays does so too.
            if not engine.live() and (asked.detach or not Submission.all_of(sweep)):
                raise
            say(f"nothing submitted, {missing} workers wait for room in the queue: {error}")
            return True
        for made in arrays:
            begun()
            after = f", after {', '.join(made.after)}" if made.after else ""
            say(f"submitted job {made.job}: {made.what}{after}")
        left = missing - sum(made.size for made in arrays) if engine.allocation is None else 0
        if engine.refused:
            say(f"{left} of {missing} workers are not submitted yet; the jobs submit them as they end: {engine.refused}")
        if engine.refused or left <= 0:
            return True
