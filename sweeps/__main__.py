"""`python -m sweeps status|results|report|advice|study|logs|cancel SWEEP_FOLDER`: look at a sweep, or stop it; nothing starts."""

import argparse
import json
import shlex
import sys
import traceback
from pathlib import Path

from jobs.cli import INTERRUPTED, Parser, resolved
from jobs.slurm.queue import SlurmError
from sweeps.cli.cancel import cancel
from sweeps.execution.monitor import wide_console
from sweeps.report import tables, usage
from sweeps.report.status import best_line, best_so_far, live_table, rungs_line, sweep_status, warning_lines
from sweeps.spec.sweep import Trial
from sweeps.state.folder import Sweep, View
from sweeps.state.logs import follow


def find_trials(view: View, names: list[str]) -> list[Trial]:
    """The trials that `names` mean: the start of a signature, a trial's number, or 'setting/seed'; ValueError unless each means one."""
    found = []
    for name in names:
        meant = [t for t in view.sweep.trials if t.signature.startswith(name) or name in (str(t.number), f"{t.setting}/{t.seed}")]
        exact = [t for t in meant if name == str(t.number)] or meant
        if len(exact) != 1:
            choice = "a signature's start, a number or setting/seed of python -m sweeps status"
            raise ValueError(f"TRIAL must name one trial by {choice}; got {name}, which names {len(exact)}")
        found += exact
    return found


def show(view: View, asked: argparse.Namespace) -> int:
    """Print, or write, what was asked for of a sweep."""
    console = wide_console()
    if asked.command == "study":
        from sweeps.report.optuna_study import mirror  # who looks at a sweep otherwise needs no Optuna

        print(f"optuna-dashboard {shlex.quote(str(mirror(view)))}")
        return 0
    if asked.command == "status":
        found = sweep_status(view)
        if asked.json:
            print(json.dumps({**found, "best": best_so_far(view)}))
        else:
            shown = live_table(found, None)
            console.print(shown if shown.row_count else shown.title, highlight=False)
            for line in (*warning_lines(view, found), rungs_line(view), best_line(view)):
                if line:
                    console.print(line, highlight=False, soft_wrap=True)
        return 0
    if asked.command == "report":
        return make_page(view)
    if asked.command == "advice":
        lines = usage.advice_lines(view)
        if asked.json:
            print(json.dumps({"lines": lines, "trials": {s: e.to_dict() for s, e in usage.all_of(view).items()}}))
        else:
            print("\n".join(lines or ["no run has completed"]))
        return 0
    tables.write_all(view)
    if asked.format == "table":
        console.print(tables.terminal_table(view))
    else:
        print(tables.FORMATS[asked.format](view), end="")
    return 0


def make_page(view: View) -> int:
    """Write report.html and return 0; on a bug of the report print one line with file and line number, and return 1."""
    from sweeps.report import html

    try:
        print(html.write(view))
    except (ValueError, OSError, SlurmError):  # of what the folder holds, or the disk
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"error: {what} ({Path(last.filename).name}, line {last.lineno}), a fault of the page and not of the sweep", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    """The door; exit status 2 where the folder holds no sweep."""
    parser = Parser(prog="python -m sweeps", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="where the trials stand")
    status.add_argument("--json", action="store_true", help="one JSON object")
    table = commands.add_parser("results", help="rebuild results.csv, summary.csv and ablation.png, and print the table")
    table.add_argument("--format", choices=["table", *tables.FORMATS], default="table")
    page = commands.add_parser("report", help="rebuild report.html: one page that needs no network, also while the sweep runs")
    use = commands.add_parser("advice", help="what completed runs used of what was asked for, and what to ask for next time")
    use.add_argument("--json", action="store_true", help="one JSON object, with each run's own figures")
    study = commands.add_parser("study", help="write optuna.journal, which optuna-dashboard shows")
    logs = commands.add_parser("logs", help="what a trial prints, until it ends")
    logs.add_argument("--no-follow", dest="follow", action="store_false", help="print what is there and return")
    stop = commands.add_parser(
        "cancel", help="stop all trials, or those named, after a checkpoint; the sweep's command takes them up again"
    )
    for command in (status, table, page, use, study, logs, stop):
        command.add_argument("folder", type=Path)
    logs.add_argument("trial", nargs="?", help="default: one that runs")
    stop.add_argument("trial", nargs="*", help="default: all, waiting jobs too")
    try:
        asked = parser.parse_args()
        view = View.here(Sweep.load(resolved(asked.folder, "SWEEP_FOLDER")))
        if asked.command == "logs":
            return follow(view, next(iter(find_trials(view, [asked.trial] if asked.trial else [])), None), asked.follow)
        if asked.command == "cancel":
            print(cancel(view, find_trials(view, asked.trial)))
            return 0
        return show(view, asked)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, SlurmError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: SWEEP_FOLDER must be a folder that can be read; got {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
