"""Runs that are under way, as someone who watches their sweep finds them."""

import io
import json
import os
import time
from pathlib import Path

from rich.console import Console

from cnnjepa.run import pace
from sweeps.report.board import Board
from sweeps.report.standing import standing
from sweeps.report.status import sweep_status
from sweeps.state import claims
from sweeps.state.claims import Process
from sweeps.state.view import View


def begun(view: View, number: int, ago: float = 100.0) -> Path:
    """Let this process hold a trial, since so many seconds; return its run folder."""
    trial = view.sweep.trials[number]
    folder = view.sweep.trial_dir(trial)
    attempt = len(view.claims(trial)) + 1
    with_clock, claims.time.time = claims.time.time, lambda: with_clock() - ago  # type: ignore[assignment]
    try:
        assert claims.claim(folder, attempt, Process.me().driver, 0) is not None
    finally:
        claims.time.time = with_clock  # type: ignore[assignment]
    return folder


def running(
    view: View, number: int, epoch: float, probe: float | None = None, phase: str = "training", silent: float = 0.5, ago: float = 100.0
) -> Path:
    """A trial that has trained to `epoch` since so many seconds, and has shown no progress for `silent` ones."""
    folder, now = begun(view, number, ago), time.time()
    lines = [{"kind": "step", "step": int(10 * e), "epoch": e, "loss": 1 / e, "images_per_second": 812.0} for e in (epoch / 2, epoch)]
    if probe is not None:
        lines.insert(1, {"kind": "probe", "step": int(5 * epoch), "epoch": epoch / 2, view.sweep.objective: probe})
    records = folder / "metrics.jsonl"
    records.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    os.utime(records, (now, now))
    beat(folder, phase, silent, now - ago)
    return folder


def beat(folder: Path, phase: str = "training", silent: float = 0.5, began: float = 0.0) -> None:
    """Write the last sign of progress, so many seconds ago."""
    file, now = pace.file_of(folder, 1), time.time()
    file.write_text(json.dumps({"phase": phase, "usual": 0.8, "limit": 600.0, "began": began, "stepped": now - silent if began else 0.0}))
    os.utime(file, (now - silent, now - silent))


def text_of(view: View, width: int = 80, height: int | None = None, below: tuple[str, ...] = (), phase: str = "", **options: object) -> str:
    """The board of a sweep, as a console of that size shows it; without a change of colour unless the console may."""
    console = Console(file=io.StringIO(), width=width, height=height, markup=False, **options)  # type: ignore[arg-type]
    console.print(Board(sweep_status(view), standing(view), view.sweep.path, phase).fitted(console, height, below), highlight=False)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]
