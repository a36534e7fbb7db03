"""`python -m sweeps COMMAND SWEEP_FOLDER`: look at a sweep or stop it; `run FILE` starts or resumes one."""

import argparse
import json
import shlex
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

from jobs.cli import Parser, exit_status, printable, resolved
from jobs.slurm.nodes import Nodes
from jobs.slurm.queue import SlurmError
from jobs.trials import HOW, find
from sweeps.cli import side_by_side
from sweeps.cli.cancel import cancel
from sweeps.cli.export import add_options, export
from sweeps.cli.new import new
from sweeps.execution.monitor import wide_console
from sweeps.report import one_trial, tables, usage
from sweeps.report.board import Board
from sweeps.report.chance import chance_lines
from sweeps.report.standing import standing
from sweeps.report.status import best_line, best_so_far, in_full, rungs_line, skipped_lines, sweep_status, unlisted_line, warning_lines
from sweeps.search.search import why_over
from sweeps.state.folder import Sweep
from sweeps.state.logs import follow
from sweeps.state.submission import moved_line
from sweeps.state.view import View

_LEAST_LINES = 15  # of the board in a low terminal


def show(view: View, asked: argparse.Namespace) -> int:
    """Print or write what the command asks for; return the exit status."""
    console = wide_console()
    if asked.command == "study":
        from sweeps.report.optuna_study import mirror  # the other commands need no Optuna

        print(f"optuna-dashboard {shlex.quote(str(mirror(view)))}")
    elif asked.command == "status":
        found = in_full(view) if asked.json else sweep_status(view)
        if asked.json:
            print(json.dumps({**found, "best": best_so_far(view), "chance": chance_lines(view)}))
        else:
            leads = standing(view)
            waits, moved = [w["line"] for w in found["waiting"]], moved_line(view.sweep, view.watch.queue)
            lines = [found["to_go_on"], *waits, *found["damaged"], *found["nodes"], moved, *skipped_lines(view, found)]
            lines += [*warning_lines(view, found), *chance_lines(view), unlisted_line(view), rungs_line(view)]
            lines = list(filter(None, [*lines, why_over(view), best_line(view, leads.leader)]))
            room = console.height - 2 - sum(len(printable(line)) // console.width + 1 for line in lines)
            board = Board(found, leads, view.sweep.path).fitted(console, max(room, _LEAST_LINES) if console.is_terminal else None)
            console.print(board, highlight=False)
            for line in lines:
                console.print(line, highlight=False, soft_wrap=True)
    elif asked.command == "report":
        return make_page(view)
    elif asked.command == "advice":
        lines = usage.advice_lines(view)
        if asked.json:
            print(json.dumps({"lines": lines, "trials": {s: asdict(e) for s, e in usage.all_of(view).items()}}))
        else:
            print("\n".join(map(printable, lines or ["no run has completed"])))
    else:
        tables.write_all(view)
        if asked.format == "table":
            console.print(tables.terminal_table(view, console.width, None if asked.all else tables.MOST_LINES))
        else:
            print(printable(tables.FORMATS[asked.format](view), keep="\n"), end="")
    return 0


def make_page(view: View) -> int:
    """Write report.html; at a bug in the report, print its file and line and return 1."""
    from sweeps.report import html

    try:
        print(html.write(view))
    except (ValueError, OSError, SlurmError):  # about the folder's content or the disk
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"error: {what} ({Path(last.filename).name}, line {last.lineno}), a bug in the report and not in the sweep", file=sys.stderr)
        return 1
    return 0


_COMMANDS = {  # name: one line of help, and the words of an example after the folder
    "status": ("show how far each trial is", ""),
    "results": ("print the results table; rebuild results.csv, summary.csv and ablation.png", "--format markdown"),
    "report": ("rebuild report.html, one page that needs no network", ""),
    "show": ("show one trial: scores, configuration, what differs, attempts, how to run it alone", "3"),
    "logs": ("print the log of a trial until it ends", "0"),
    "nodes": ("show which nodes failed and which are avoided, or forget what happened on some", "--clear gpu07"),
    "cancel": ("stop trials after a checkpoint", ""),
    "study": ("write optuna.journal and print the optuna-dashboard command that shows it", ""),
    "export": ("write the trials to MLflow or Weights & Biases; again, to update them", "--to mlflow"),
    "advice": ("show what completed runs used, and what to request from Slurm next time", ""),
}
RUN, NEW = "run", "new"
_FOLDER = "runs/predictor_ablation-smoke"


def command_line() -> Parser:
    """Return the parser of `python -m sweeps`."""
    text = "Start or resume a sweep, look at it, or stop it."
    example = f"example:\n  python -m sweeps status {_FOLDER}\n\npython -m sweeps COMMAND --help shows the options of a command.\n"
    example += f"jobs.pretrain --like, jobs.export and jobs.probe take one trial of a sweep, as {_FOLDER}/3."
    parser = Parser(prog="python -m sweeps", description=text, epilog=example)
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    groups = {}
    for name, (does, words) in _COMMANDS.items():
        shown = " ".join(["python -m sweeps", name, _FOLDER, *words.split()])
        made = commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.", epilog=f"example:\n  {shown}")
        what = made.add_argument_group("what to stop" if name == "cancel" else "what to show")
        what.add_argument("folder", type=Path, metavar="SWEEP_FOLDER", help="such as runs/NAME-smoke; the sweep's command prints it")
        groups[name] = what, made.add_argument_group("how")
    side_by_side.add_commands(commands)
    started = "python -m sweeps run my_sweep.py --cluster local --dry-run"
    does = "run or resume the sweep of a file"
    made = commands.add_parser(RUN, help=does, description=f"{does[0].upper()}{does[1:]}.", epilog=f"example:\n  {started}")
    made.add_argument("file", metavar="FILE", help="Python file with a SweepSpec, or the name of a sweep that a package offers")
    made.add_argument("rest", nargs="*", metavar="...", help="options of the sweep; FILE --help lists them")
    does = "write a sweep's file to start from, which learns as it stands"
    made = commands.add_parser(
        NEW, help=does, description=f"{does[0].upper()}{does[1:]}.", epilog="example:\n  python -m sweeps new my_question"
    )
    made.add_argument("name", metavar="NAME", help="of the file and the sweep, such as my_question")
    trial = f"{HOW}, as `status` and --dry-run show them"
    groups["show"][0].add_argument("trial", metavar="TRIAL", help=trial)
    groups["show"][0].add_argument("other", nargs="?", metavar="OTHER", help="a trial to compare it with (default: the sweep's base)")
    groups["show"][1].add_argument("--json", action="store_true", help="print one JSON object, with all hyperparameters")
    groups["logs"][0].add_argument("trial", nargs="?", metavar="TRIAL", help=f"{trial} (default: a running one)")
    groups["cancel"][0].add_argument("trial", nargs="*", metavar="TRIAL", help=f"{trial} (default: all, and their queued jobs)")
    groups["logs"][1].add_argument("--no-follow", dest="follow", action="store_false", help="print the log so far and return")
    formats = ["table", *tables.FORMATS]
    groups["nodes"][1].add_argument("--clear", nargs="+", default=[], metavar="NODE", help="forget what happened on these nodes so far")
    groups["nodes"][1].add_argument("--json", action="store_true", help="print one JSON object")
    groups["results"][1].add_argument("--format", choices=formats, default="table", help="default: %(default)s")
    most = f"print all configurations, not only the {tables.MOST_LINES} best"
    groups["results"][1].add_argument("--all", action="store_true", help=f"{most}; the other formats always do")
    groups["status"][1].add_argument("--json", action="store_true", help="print one JSON object")
    add_options(groups["export"][1])
    groups["advice"][1].add_argument("--json", action="store_true", help="print one JSON object with the figures of each run")
    return parser


def main() -> int:
    """Run the command line; return 2 if the folder holds no sweep. Print help without a command."""
    parser = command_line()
    if len(sys.argv) == 1:
        parser.print_help()
        return 0
    return exit_status(lambda: run(parser))


def run(parser: Parser) -> int:
    """Do what the command line asks; return the exit status. Raise ValueError at wrong usage."""
    if (
        sys.argv[1:2] == [RUN] and len(sys.argv) > 2 and not sys.argv[2].startswith("-")
    ):  # what follows the file belongs to its own command line
        from sweeps.cli.sweep_file import run_file  # the other commands need no torch

        return run_file(sys.argv[2], sys.argv[3:])
    asked = parser.parse_args()
    if asked.command == NEW:
        return new(asked.name)
    if asked.command in (side_by_side.LIST, side_by_side.COMPARE):
        return side_by_side.show(asked, wide_console())
    view = View.here(Sweep.load(resolved(asked.folder, "SWEEP_FOLDER")))
    if asked.command == "logs":
        return follow(view, find(view.sweep.trials, asked.trial) if asked.trial else None, asked.follow)
    if asked.command == "cancel":
        print(printable(cancel(view, [find(view.sweep.trials, name) for name in asked.trial])))
        if moved := moved_line(view.sweep, view.watch.queue):
            print(printable(moved))
        return 0
    if asked.command == "export":
        return export(view, asked)
    if asked.command == "show":
        return show_trial(view, asked)
    if asked.command == "nodes":
        return show_nodes(view.sweep.nodes, asked)
    return show(view, asked)


def show_trial(view: View, asked: argparse.Namespace) -> int:
    """Print all about the trial that the command names."""
    trial = find(view.sweep.trials, asked.trial)
    found = one_trial.about(view, trial, find(view.sweep.trials, asked.other) if asked.other else None)
    print(json.dumps(found) if asked.json else "\n".join(one_trial.lines(view, trial, found)))
    return 0


def show_nodes(nodes: Nodes, asked: argparse.Namespace) -> int:
    """Clear the nodes that the command names, and print what is known of the others."""
    known = {node for fault in nodes.live() for node in fault.nodes}
    for node in asked.clear:
        if node not in known:
            said = ", ".join(sorted(known)) or "none"
            raise ValueError(f"--clear must name nodes that have failed lately; got {node}: choose among {said}")
    for node in asked.clear:
        nodes.clear(node)
    if asked.json:
        faults = [{**asdict(f), "kind": f.kind.name} for f in nodes.live()]
        print(json.dumps({"avoided": list(nodes.avoided()), "usable": nodes.total, "faults": faults}))
    else:
        shown = [*(nodes.lines() or ["no node is avoided"]), *(f.line for f in nodes.live())]
        print("\n".join(map(printable, shown)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
