"""`python -m jobs.drill`: run a small training, or a program of your own, under faults and compare it with a reference run."""

import argparse
import datetime
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from cnnjepa.run.identity import task_module
from jobs.cli import Parser, begun, exit_status, require_writable, resolved
from jobs.cluster import ClusterProfile, Scheduler
from jobs.command import CommandTask, written
from jobs.config import PROFILES, absolute, compose_job, override_keys, qualified
from jobs.resuming.command import CommandLine
from jobs.resuming.program import Own, add_arguments, check_arguments, drill_program, named
from jobs.slurm.queue import has_slurm
from sweeps.cli.sweep_file import spec_of
from sweeps.drill.campaign import Drill, Scene, drill
from sweeps.drill.local_faults import RunHere
from sweeps.drill.slurm_faults import RunOnSlurm, command
from sweeps.drill.summary import report
from sweeps.spec.check_sweep import check_spec
from sweeps.spec.sweep import ScaleName


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; raise ValueError at what --help does not show."""
    text = """Inject faults into a small training run, and compare it bit for bit with a reference run.
With --task or --command: kill a program of your own, resume it, and name what it has forgotten.

Exit status: 0 nothing is lost, 1 anything is lost, duplicated or different, 2 wrong usage."""
    example = "examples:\n  python -m jobs.drill --faults 100 --seed 7\n  python -m jobs.drill --task my_sweep.py epochs=6"
    parser = Parser(prog="python -m jobs.drill", description=text, epilog=example, keys=override_keys, intermixed=True)
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "overrides", nargs="*", metavar="key=value", help="set a key of the run (device=cuda) or of the profile (account=abc)"
    )
    what.add_argument("--faults", type=int, default=20, metavar="N", help="how many to inject (default: %(default)s)")
    what.add_argument("--seed", type=int, default=1, metavar="N", help="seed of their order and times (default: %(default)s)")
    what.add_argument("--dry-run", action="store_true", help="show the batch script; run nothing")
    where = parser.add_argument_group("where and how")
    where.add_argument("--cluster", default="local", metavar="PROFILE", help=f"{PROFILES} (default: %(default)s)")
    folder = "keep the runs here (default: a temporary folder on this machine, the profile's runs_dir on a cluster)"
    where.add_argument("--runs-dir", type=Path, metavar="DIR", help=folder)
    add_arguments(parser)
    asked: argparse.Namespace = parser.parse_args(arguments)
    check_arguments(asked)
    asked.runs_dir = asked.runs_dir and resolved(asked.runs_dir, "--runs-dir")
    return asked


def check(asked: argparse.Namespace) -> ClusterProfile:
    """Return the profile to drill on; raise ValueError at the first broken rule."""
    if asked.faults < 1:
        raise ValueError(f"--faults must be at least 1; got {asked.faults}")
    own = [o for o in qualified(asked.overrides) if o.startswith("cluster.")]
    cluster = compose_job([f"cluster={asked.cluster}", *own]).cluster
    slurm = cluster.scheduler is Scheduler.slurm
    if slurm and not asked.dry_run and not has_slurm():
        raise ValueError(f"--cluster {cluster.name} must be used where Slurm is installed; got no squeue here: use --dry-run for a preview")
    if not asked.dry_run and (asked.runs_dir or slurm):
        require_writable(asked.runs_dir or Path(cluster.runs_dir), "--runs-dir" if asked.runs_dir else "runs_dir")
    return cluster


def what_it_would_do(asked: argparse.Namespace, cluster: ClusterProfile) -> str:
    """Return what the sweep's command prints for a dry run; raise ValueError if it refuses."""
    line = [*command(absolute(asked.cluster), cluster, asked.runs_dir or Path(cluster.runs_dir), asked.overrides), "--dry-run"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip().removeprefix("error: "))
    return done.stdout


def run_drill(asked: argparse.Namespace, cluster: ClusterProfile, folder: Path) -> Drill:
    """Run the drill and print its progress."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {text}", flush=True)

    def make(name: str) -> Scene:
        if cluster.scheduler is Scheduler.slurm:
            return RunOnSlurm(absolute(asked.cluster), cluster, folder / name, asked.overrides)
        return RunHere(folder / name, asked.overrides)

    return drill(make, asked.faults, asked.seed, say)


def of_sweep(file: str, overrides: Sequence[str]) -> Own:
    """Return the task or command of a sweep's file at smoke scale, with the values of its first configuration, then `overrides`.

    Of a search, it is the unchanged configuration. Raise ValueError if the file holds no sweep that could be run.
    """
    try:
        spec = spec_of(file).resolved(Path(file).stem)
    except ValueError as error:
        raise ValueError(re.sub("^FILE", "--task", str(error))) from error
    scale = spec.scale(ScaleName.smoke)
    check_spec(spec, scale, ScaleName.smoke.value)
    first = [f"{key}={value}" for c in spec.configurations_at(scale)[:1] for key, value in c.overrides.items()]
    words, folder = [*scale.overrides, *first, *overrides], resolved(Path(file), "--task").parent
    task = task_module(spec.task_name)
    if not isinstance(task, CommandTask):
        return Own(folder, spec.task_name, words)
    config = compose_job(words, spec.task_name).train
    values = {field.name: written(getattr(config, field.name)) for field in fields(config)}
    return Own(folder, command=CommandLine(task.words, values, task.grace_seconds, task.position))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status that --help explains."""
    return exit_status(lambda: run(arguments))


def run(arguments: Sequence[str] | None) -> int:
    """Run the drill; return the exit status. Raise ValueError at wrong usage."""
    try:
        asked = parse(arguments)
        if asked.task is not None or asked.command is not None:
            is_file = asked.task is not None and (asked.task.endswith(".py") or "/" in asked.task)
            return drill_program(asked, of_sweep(asked.task, asked.overrides) if is_file else named(asked))
        cluster = check(asked)
        shown = what_it_would_do(asked, cluster)
        if asked.dry_run:
            print(shown, end="")
            return 0
        # SIGTERM, too, must end all processes and remove the folder.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        begun()
        with tempfile.TemporaryDirectory(prefix="cnnjepa-drill-") as passing:
            kept = asked.runs_dir or (Path(cluster.runs_dir) if cluster.scheduler is Scheduler.slurm else None)
            folder = kept / f"drill-{datetime.datetime.now():%Y%m%d-%H%M%S}" if kept else Path(passing)
            found = run_drill(asked, cluster, folder.resolve())
    except (TimeoutError, ChildProcessError) as error:
        print(f"THE DRILL HAS FAILED: {error}", file=sys.stderr)
        return 1
    print(report(found, asked.faults))
    return 0 if found.holds and len(found.injected) == asked.faults else 1


if __name__ == "__main__":
    sys.exit(main())
