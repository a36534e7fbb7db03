"""Command of every sweep, `python sweeps/<name>.py`: plan, check, run and write results."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from rich.console import Console

from jobs import own_code
from jobs.cli import exit_status
from jobs.cluster import Scheduler
from jobs.planned import kind_of_data
from jobs.task import task_named
from sweeps.cli import local, submit
from sweeps.cli.data import PlannedData
from sweeps.cli.estimate import priced
from sweeps.cli.plan import parse, plan
from sweeps.cli.program import settle
from sweeps.cli.until_decided import first_line, next_round
from sweeps.cli.withdrawal import settle_withdrawn
from sweeps.execution.changes import announce_changes
from sweeps.execution.monitor import wide_console
from sweeps.search.search import Outlook
from sweeps.spec.sweep import SweepSpec
from sweeps.state.folder import Sweep
from sweeps.state.view import View


def run(
    spec: SweepSpec,
    arguments: Sequence[str],
    typed: float | None = None,
    command: str = "",
    console: Console | None = None,
    embedded: Callable[[Sweep], None] | None = None,
) -> int:
    """Run the command line and return the exit status; raise ValueError at wrong usage.

    `typed` is when it was typed, in seconds since the Unix epoch; by default now. `command` is what
    a person types before the arguments, for --help. `console` shows what happens. With `embedded`,
    which is given the sweep once it is planned, the process belongs to the caller: its signals
    stay as they are, and it is never left.
    """
    spec = spec.resolved(Path(sys.argv[0]).stem)
    task_named(spec.task_name)
    module = spec.task_name.partition(":")[0]
    own_code.name(module, getattr(sys.modules.get(module), "__file__", None))
    asked = parse(spec, arguments, command)
    asked.typed = time.time() if typed is None else typed
    asked.embedded, asked.words = embedded is not None, [command, *arguments] if embedded else None
    asked.agrees = asked.yes  # a person's own word, also from Python
    asked.detach, asked.yes = asked.detach or asked.embedded, asked.yes or asked.embedded
    console = console or wide_console()
    data = PlannedData(asked)
    sweep, cluster = plan(spec, asked, data)
    if embedded is not None:
        embedded(sweep)
    for line in data.lines:
        console.print(line, highlight=False, soft_wrap=True)
    if not data.started_again and not data.missing:
        settle_withdrawn(sweep, asked, console)
    if asked.until_decided is not None and not data.missing:
        console.print(first_line(sweep), highlight=False, soft_wrap=True)
        sweep = next_round(sweep, asked, cluster, console) or sweep
    if cluster.scheduler is Scheduler.slurm:
        allocation = submit.allocation_of(asked, cluster)
        sweep, price = priced(sweep, allocation.part(cluster) if allocation else cluster, asked)
        if not asked.dry_run:
            return submit.run(sweep, cluster, allocation, price, asked, console)
        show_plan(sweep, asked, console, data.missing)
        submit.show_script(sweep, cluster, allocation, price, console)
        return 0
    local.check(asked)
    if asked.max_gpu_hours is not None:
        sweep, _ = priced(sweep, cluster, asked)
    if not asked.dry_run:
        return local.run(sweep, cluster, asked, console)
    show_plan(sweep, asked, console, data.missing)
    return 0


def show_plan(sweep: Sweep, asked: argparse.Namespace, console: Console, missing: str = "") -> None:
    """Print the trials and their states; write nothing. `missing` says why their run IDs are unknown."""
    view = View.here(sweep)
    announce_changes(sweep, console)
    settle(sweep, View.here(sweep), asked, console)
    if missing:
        console.print(
            f"the run IDs are not known here, since they depend on the {kind_of_data(sweep.trials[0].values)}: {missing}",
            highlight=False,
            soft_wrap=True,
        )
    for trial in sweep.trials:
        run_id = "?" * len(trial.signature) if missing else trial.signature
        console.print(f"{run_id}  {view.state(trial).name:11}  {trial.name}  {trial.label}", highlight=False, soft_wrap=True)
    epochs = " or ".join(str(e) for e in sorted({t.epochs for t in sweep.trials}))
    each = f", {epochs} {sweep.counted} each" if sweep.task.counted(sweep.trials[0].values) else ""
    console.print(f"{len(sweep.trials)} trials{each}, in {sweep.path}", soft_wrap=True)
    if sweep.rungs:
        when = f"after {sweep.counted} {', '.join(map(str, sweep.rungs))}"
        if sweep.varies_epochs:
            shares = " and ".join(f"1/{sweep.eta**k}" for k in range(len(sweep.rungs), 0, -1))
            when = f"after {shares} of its {sweep.counted} each run is compared, and"
        console.print(f"{when} the best 1/{sweep.eta} of the runs continue", highlight=False)
    if (search := sweep.search) is not None:
        more = Outlook(view).runs_left_at_most
        what = f"{search.sampler} chooses up to {search.max_trials} configurations; the best of them get up to {search.seeds} seeds"
        console.print(f"{what}: at most {more} further runs", highlight=False, soft_wrap=True)


def main(spec: SweepSpec) -> None:
    """Run the command line and exit: 0 all completed, 1 some failed, 2 usage, 130 stopped."""
    sys.exit(exit_status(lambda: run(spec, sys.argv[1:], psutil.Process().create_time())))
