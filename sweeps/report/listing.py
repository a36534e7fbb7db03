"""List the sweeps of a folder of runs: how far each is, its best configuration, and the command that goes on."""

import datetime
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from cnnjepa.run import identity
from jobs import program
from jobs.cli import printable
from jobs.slurm.queue import Queue, has_slurm
from jobs.task import task_named
from sweeps.report.aggregate import leader_of, summaries
from sweeps.report.best import score_of_best
from sweeps.report.status import best_so_far
from sweeps.report.terminal import Column, fitted
from sweeps.search.search import Outlook
from sweeps.state.folder import Sweep
from sweeps.state.history import called_from_python, in_words, last_command
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View


def sweeps_in(runs: Path) -> list[dict[str, Any]]:
    """Return what is known of each sweep in `runs`, the last changed first, as plain JSON values.

    Raise ValueError if `runs` is no folder.
    """
    if not runs.is_dir():
        raise ValueError(f"RUNS must be the folder of your sweeps; got {runs}: there is no such folder")
    queue = Queue() if has_slurm() else None
    found = [_described(file.parent, queue) for file in sorted(runs.glob("*/sweep.json"))]
    return sorted(found, key=lambda known: (known["changed"], known["name"]), reverse=True)


def _described(folder: Path, queue: Queue | None) -> dict[str, Any]:
    command = last_command(folder)
    about: dict[str, Any] = {"name": folder.name, "folder": str(folder), "command": in_words(command) if command else ""}
    about |= {"from_python": called_from_python(command), "sweep": "", "scale": "", "counts": {}, "trials": 0, "best": None, "left": False}
    try:
        with _own_program(folder):
            sweep = Sweep.load(folder)
            view = View(sweep, queue=queue if (folder / "submissions").is_dir() else None)
            states = view.states()
            counts = Counter(state.name for state in states.values())
            left = any(not state.settled for state in states.values()) or (sweep.search is not None and Outlook(view).to_begin > 0)
            left |= TrialState.cancelled in states.values()
            about |= {"sweep": sweep.name, "scale": sweep.scale.name, "counts": dict(counts), "trials": len(states), "left": left}
            return {**about, "best": best_so_far(view), "best_line": _best(view), "changed": _changed(folder, sweep), "cause": ""}
    except ValueError as error:
        return {**about, "best_line": "", "changed": _changed(folder, None), "cause": str(error)}


@contextmanager
def _own_program(folder: Path) -> Iterator[None]:
    """Take the sweep's own copy of its task inside the block: another sweep may have another module of that name."""
    known = None
    with suppress(ValueError):
        known = program.read(folder)
    placed = known is None or identity.is_placed(known.module)
    try:
        yield
    finally:
        if known is not None and not placed:
            identity.forget(known.module)
            identity.config_class.cache_clear()
            task_named.cache_clear()


def _best(view: View) -> str:
    """Return '73.1 % (95 % interval 72.0 to 74.2) †: depth 3', † if it is tied: the score that every table has of the best."""
    objective = view.sweep.objective
    lead = leader_of(view, summaries(view), objective)
    if lead is None:
        return ""
    tied = " †" if lead.other is not None and not lead.significant else ""
    return f"{score_of_best(view, lead)}{tied}: {lead.best.label}"


def _changed(folder: Path, sweep: Sweep | None) -> str:
    """Return when a file of the sweep or of its trials was last written, in ISO 8601."""
    files = [folder / "sweep.json", folder / "commands.jsonl"]
    if sweep is not None:
        folders = [sweep.run(trial) for trial in sweep.trials]
        files += [path for run in folders for path in (run.path / "result.json", run.records)]
    times = [0.0]
    for path in files:
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return datetime.datetime.fromtimestamp(max(times)).isoformat(timespec="seconds")


def table(found: Sequence[dict[str, Any]], runs: Path, width: int) -> Table:
    """Return a line per sweep in at most `width` characters."""
    made = Table(title=f"{runs}: {len(found)} sweep{'s' * (len(found) != 1)}", title_justify="left")
    texts = [
        ("sweep", [f["name"] for f in found]),
        ("trials", [f["cause"] or ", ".join(f"{n} {state}" for state, n in f["counts"].items()) for f in found]),
        ("best", [f["best_line"] for f in found]),
    ]
    columns = [Column(name, [printable(text) for text in cells], words=True, most_lines=None, keep=True) for name, cells in texts]
    columns.append(Column("last change", [f["changed"][:16].replace("T", " ") for f in found]))
    if any("†" in f["best_line"] for f in found):
        made.caption, made.caption_justify = "†: tied with another configuration", "left"
    return fitted(columns, width, made, "list --json has all")


def to_go_on(found: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line with the command for each sweep that has trials left; of one that runs, it watches."""
    lines = []
    for known in found:
        if known["left"]:
            again = "run it again from Python" if known["from_python"] else known["command"] or "the sweep's command"
            what = f"to watch {known['name']}, which runs" if known["counts"].get("running") else f"to go on with {known['name']}"
            lines.append(f"{what}: {again}")
    return lines
