"""Where a sweep stands, from its run folders and Slurm: for the live table, `python -m sweeps status` and scripts."""

from typing import Any

from rich.table import Table

from cnnjepa.runs import read_metrics
from sweeps import claims
from sweeps.folder import TrialState, View
from sweeps.spec import Trial

# The end of metrics.jsonl that holds the latest step and probe.
_TAIL_BYTES = 65536


def share_done(trial: Trial, record: dict[str, Any]) -> float:
    """Share of the run that is done after `record`, in [0, 1]."""
    return min(float(record["epoch"]) / trial.epochs, 1.0)


def latest(records: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The last record of its kind, {} where there is none."""
    return next((r for r in reversed(records) if r["kind"] == kind), {})


def trial_status(view: View, trial: Trial) -> dict[str, Any]:
    """One trial's state, progress, latest numbers and job as plain JSON values."""
    state, result = view.state(trial), view.result(trial)
    folder = view.sweep.trial_dir(trial)
    records = [] if state.ended or state is TrialState.waiting else read_metrics(folder / "metrics.jsonl", _TAIL_BYTES)
    step, past = latest(records, "step"), view.claims(trial)
    job = past[-1].slurm if past else None
    gpu_seconds = sum(claims.held_seconds(folder, c) * c.slurm.gpus for c in past if c.slurm)
    return {
        "signature": trial.signature,
        "setting": trial.setting,
        "seed": trial.seed,
        "state": state.name,
        "done": 1.0 if state is TrialState.completed else share_done(trial, step) if step else 0.0,
        "epoch": step.get("epoch"),
        "loss": step.get("loss"),
        "images_per_second": step.get("images_per_second"),
        "probe": latest(records, "probe").get(view.sweep.objective),
        "objective": view.objective(trial),
        "job": job.job if job else None,
        "node": job.node if job else None,
        "restarts": max(len(past) - 1, 0),
        "gpu_hours": gpu_seconds / 3600,
        "cause": result.cause if result else "",
        "missing": result.missing if result else {},
    }


def sweep_status(view: View) -> dict[str, Any]:
    """All trials and their counts by state."""
    trials = [trial_status(view, t) for t in view.sweep.trials]
    counts = {state.name: sum(t["state"] == state.name for t in trials) for state in TrialState}
    hours = sum(t["gpu_hours"] for t in trials)
    silent = view.watch.queue is not None and view.watch.queue.silent
    name, scale = view.sweep.name, view.sweep.scale.name
    return {"name": name, "scale": scale, "counts": counts, "gpu_hours": hours, "slurm_silent": silent, "trials": trials}


def counts_line(status: dict[str, Any]) -> str:
    """'12 completed, 2 running, 8 waiting of 22 trials', and what they have used of GPUs in Slurm."""
    shown = [f"{n} {name}" for name, n in status["counts"].items() if n]
    line = ", ".join(reversed(shown)) + f" of {len(status['trials'])} trials"
    if status["gpu_hours"]:
        line += f", {status['gpu_hours']:.1f} GPU-hours used"
    return line + (" (Slurm does not answer; this is what it said last)" if status["slurm_silent"] else "")


def live_table(status: dict[str, Any], minutes_left: float | None) -> Table:
    """Counts, and one line for each trial that was begun and has not completed."""
    left = "" if minutes_left is None else f", about {minutes_left:.0f} min left"
    table = Table(title=f"{status['name']} ({status['scale']}): {counts_line(status)}{left}", title_justify="left")
    columns = {"setting": "left", "seed": "right", "state": "left", "done": "right", "epoch": "right", "loss": "right"}
    columns |= {"images/s": "right", "probe": "right", "restarts": "right"}
    in_slurm = any(t["job"] for t in status["trials"])
    if in_slurm:
        columns |= {"job": "left", "node": "left", "GPU-h": "right"}
    for name, side in columns.items():
        table.add_column(name, justify="left" if side == "left" else "right")
    for t in status["trials"]:
        if t["state"] in ("waiting", "completed"):
            continue
        numbers = [(t["epoch"], ".1f"), (t["loss"], ".4f"), (t["images_per_second"], ".0f"), (t["probe"], ".1f")]
        shown = ["" if value is None else f"{value:{form}}" for value, form in numbers]
        what = t["state"] if t["state"] != "failed" else f"failed: {t['cause']}"
        row = [t["setting"], str(t["seed"]), what, f"{100 * t['done']:.0f} %", *shown, str(t["restarts"] or "")]
        table.add_row(*row, *([t["job"] or "", t["node"] or "", f"{t['gpu_hours']:.2f}"] if in_slurm else []))
    return table
