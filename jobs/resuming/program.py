"""The command of the drill for a user's program: `python -m jobs.drill --task ...` or `--command ...`."""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jobs.cli import begun, require_writable
from jobs.config import compose_job
from jobs.resuming.check import Findings, check
from jobs.resuming.command import CommandLine, Commands, check_command, words_of
from jobs.resuming.report import as_json, text
from jobs.resuming.runs import ProgramError, Runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a drill of a program."""
    own = parser.add_argument_group("your own program, on this machine")
    task_help = "name what this task forgets when it resumes: MODULE:NAME, or a sweep's file for its task or command, with its first values"
    own.add_argument("--task", metavar="TASK", help=task_help)
    own.add_argument("--command", metavar="LINE", help='drill this command, as in "python train.py --out {run_dir}"')
    own.add_argument("--kills", type=int, metavar="N", help="how many runs to disturb; each other one is asked to stop (default: 4)")
    own.add_argument("--ignore", action="append", default=[], metavar="METRIC", help="do not compare this metric; may be repeated")
    own.add_argument("--time-limit", type=float, metavar="SECONDS", help="end a run that takes longer (default: 600)")
    own.add_argument("--json", action="store_true", help="print the report as one JSON object, and progress to stderr")


def check_arguments(asked: argparse.Namespace) -> None:
    """Raise ValueError at an option that does not belong to what is drilled."""
    given = {"--kills": asked.kills, "--ignore": asked.ignore, "--time-limit": asked.time_limit, "--json": asked.json}
    if asked.task is None and asked.command is None:
        for name, value in given.items():
            if value not in (None, [], False):
                raise ValueError(f"{name} must be given with --task or --command; got neither")
        return
    if asked.task is not None and asked.command is not None:
        raise ValueError("--task must be left out with --command; got both")
    if asked.cluster != "local" or asked.dry_run:
        raise ValueError("--cluster and --dry-run must be left out with --task and --command, which run on this machine; got one of them")
    if asked.kills is not None and asked.kills < 1:
        raise ValueError(f"--kills must be at least 1; got {asked.kills}")
    if asked.time_limit is not None and not asked.time_limit > 0:
        raise ValueError(f"--time-limit must be positive; got {asked.time_limit}")


@dataclass(frozen=True)
class Own:
    """The program that is drilled: a task by its name, or a command in `command`."""

    folder: Path  # from which the task is imported, or in which the command runs
    task: str = ""
    overrides: Sequence[str] = ()
    command: CommandLine | None = None


def named(asked: argparse.Namespace) -> Own:
    """Return the program that the command line names itself; raise ValueError at a value that it does not take."""
    if asked.command is None:
        return Own(Path.cwd(), asked.task, asked.overrides)
    return Own(Path.cwd(), command=CommandLine(*words_of(asked.command, asked.overrides)))


def drill_program(asked: argparse.Namespace, own: Own) -> int:
    """Drill a task or a command and print the report; return 0 if nothing is forgotten, otherwise 1.

    Raise ValueError at wrong usage.
    """
    started, stream = time.monotonic(), sys.stderr if asked.json else sys.stdout

    def say(line: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {line}", file=stream, flush=True)

    kills, limit = asked.kills or 4, asked.time_limit or 600.0
    if own.command is None:
        sys.path[:0] = [str(own.folder)] if str(own.folder) not in sys.path else []
        compose_job([f"task={own.task}", *own.overrides])  # refuses what could not run
    if asked.runs_dir:
        require_writable(asked.runs_dir, "--runs-dir")
    with tempfile.TemporaryDirectory(prefix="cnnjepa-drill-") as passing:
        folder = (asked.runs_dir / f"drill-{time.strftime('%Y%m%d-%H%M%S')}" if asked.runs_dir else Path(passing)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        begun()
        try:
            leave_out = frozenset(asked.ignore)
            if own.command is not None:
                found = check_command(Commands(folder, own.command, own.folder, limit), kills, asked.seed, leave_out, say)
            else:
                runs = Runs(folder, own.task, own.overrides, [str(own.folder)], limit_seconds=limit)
                found = check(runs, kills, asked.seed, leave_out, say)
        except ProgramError as error:
            raise ValueError(str(error)) from error
    return show(found, asked.json)


def show(found: Findings, as_object: bool) -> int:
    """Print a report and return the exit status."""
    print(as_json(found) if as_object else text(found))
    return 0 if found.holds else 1
