"""Where a sweep stands, from its run folders alone: for the live table, `python -m sweeps status` and scripts."""

from typing import Any

from rich.table import Table

from cnnjepa.runs import read_metrics
from sweeps.folder import TrialState, View
from sweeps.spec import Trial


def share_done(trial: Trial, record: dict[str, Any]) -> float:
    """Share of the run that is done after `record`, in [0, 1]."""
    return min(float(record["epoch"]) / trial.config.epochs, 1.0)


def trial_status(view: View, trial: Trial) -> dict[str, Any]:
    """One trial's state, progress and latest numbers as plain JSON values."""
    state, result = view.state(trial), view.result(trial)
    records = [] if state.ended or state is TrialState.waiting else read_metrics(view.sweep.trial_dir(trial) / "metrics.jsonl")
    last = records[-1] if records else {}
    return {
        "signature": trial.signature,
        "setting": trial.setting,
        "seed": trial.seed,
        "state": state.name,
        "done": 1.0 if state is TrialState.completed else share_done(trial, last) if last else 0.0,
        "epoch": last.get("epoch"),
        "loss": last.get("loss"),
        "images_per_second": last.get("images_per_second"),
        "objective": view.objective(trial),
        "cause": result.cause if result else "",
        "missing": result.missing if result else {},
    }


def sweep_status(view: View) -> dict[str, Any]:
    """All trials and their counts by state."""
    trials = [trial_status(view, t) for t in view.sweep.trials]
    counts = {state.name: sum(t["state"] == state.name for t in trials) for state in TrialState}
    return {"name": view.sweep.name, "scale": view.sweep.scale.name, "counts": counts, "trials": trials}


def counts_line(status: dict[str, Any]) -> str:
    """'12 completed, 2 running, 8 waiting'."""
    shown = [f"{n} {name}" for name, n in status["counts"].items() if n]
    return ", ".join(reversed(shown)) + f" of {len(status['trials'])} trials"


def live_table(status: dict[str, Any], minutes_left: float | None) -> Table:
    """Counts, and one line for each trial that is running or failed."""
    left = "" if minutes_left is None else f", about {minutes_left:.0f} min left"
    table = Table(title=f"{status['name']} ({status['scale']}): {counts_line(status)}{left}", title_justify="left")
    for name in ("setting", "seed", "state", "done", "loss", "images/s"):
        table.add_column(name, justify="left" if name in ("setting", "state") else "right")
    for t in status["trials"]:
        if t["state"] in ("running", "interrupted", "failed"):
            loss = "" if t["loss"] is None else f"{t['loss']:.4f}"
            pace = "" if t["images_per_second"] is None else f"{t['images_per_second']:.0f}"
            what = t["state"] if t["state"] != "failed" else f"failed: {t['cause']}"
            table.add_row(t["setting"], str(t["seed"]), what, f"{100 * t['done']:.0f} %", loss, pace)
    return table
