"""Report a sweep's state from its run folders and Slurm."""

import datetime
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from cnnjepa.run import pace, refusal, skipped
from jobs.slurm.queue import EMPTY_SECONDS, SlurmSilentError
from jobs.slurm.waiting import Waiting, waiting
from jobs.task import score_format
from sweeps.report.aggregate import Summary, judged, leader_of, summaries
from sweeps.report.best import score_of_best
from sweeps.report.terminal import Column, fitted
from sweeps.search.search import Outlook
from sweeps.search.warnings import as_lines, warnings_of
from sweeps.spec import hyperparameters
from sweeps.spec.sweep import Trial
from sweeps.state import claims
from sweeps.state.history import called_from_python, in_words, last_command
from sweeps.state.place import Place
from sweeps.state.submission import Submission, job_prefix
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

# The end of metrics.jsonl that holds the latest step and probe.
_TAIL_BYTES = 65536


def share_done(trial: Trial, record: dict[str, Any]) -> float:
    """Return the share of the run that is done after `record`, in [0, 1]."""
    return min(float(record["epoch"]) / trial.epochs, 1.0)


def latest(records: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """Return the last record of its kind, or {}."""
    return next((r for r in reversed(records) if r["kind"] == kind), {})


def rungs_reached(view: View, trial: Trial) -> dict[str, float]:
    """Return rung -> objective, of the sweep's rungs that the trial reached with a value."""
    return {str(rung): value for rung, value in view.at_rungs(trial).items()}


def best_so_far(view: View) -> dict[str, Any] | None:
    """Return the best configuration by mean objective, the next and their test, or None."""
    objective = view.sweep.objective
    lead = leader_of(view, summaries(view), objective)
    if lead is None:
        return None
    other = None if lead.other is None else asdict(lead.other.spreads[objective]) | {"setting": lead.other.label}
    tested = {} if lead.comparison is None else asdict(lead.comparison)
    return {
        "setting": lead.best.label,
        **asdict(lead.best.spreads[objective]),
        "next": other,
        "significant": lead.significant,
        "judged": {name: value for name, value in asdict(lead.winner).items() if name in ("p", "estimate", "low", "high")},
        "test": tested,
    }


def best_line(view: View) -> str:
    """Return 'best so far by knn: lr 0.003: 71.2 % (95 % interval 70.1 to 72.3); next: ...', or ""."""
    objective = view.sweep.objective
    lead = leader_of(view, summaries(view), objective)
    if lead is None:
        return ""

    def score(summary: Summary) -> str:
        return f"{summary.label}: {summary.spreads[objective]} (n = {summary.spreads[objective].n})"

    line = f"best so far by {objective}: {lead.best.label}: {score_of_best(view, lead)}"
    if lead.other is None:
        return line
    return f"{line}; next: {score(lead.other)}; {'statistically significant' if lead.significant else 'tied'}, {judged(lead)}"


def nothing_to_run(view: View) -> list[str]:
    """Return a line that says when the last trial ended, if all have."""
    states = [view.state(trial) for trial in view.sweep.trials]
    if not all(state.ended for state in states):
        return []
    last = max((view.sweep.run(trial).ended_at() for trial in view.sweep.trials), default=0.0)
    when = f"{datetime.datetime.fromtimestamp(last):%Y-%m-%d %H:%M}"
    if all(state is TrialState.completed for state in states):
        return [f"nothing to run: {f'all {len(states)} trials' if len(states) > 1 else 'the trial'} completed on {when}"]
    counts = ", ".join(f"{states.count(state)} {state.name}" for state in TrialState if state in states)
    failed = "; --retry-failed runs failed ones again" if TrialState.failed in states else ""
    return [f"nothing to run: {counts} of {len(states)} trials, the last on {when}{failed}"]


def rungs_line(view: View) -> str:
    """Return 'rungs: epoch 2: 9 runs, epoch 6: 3 runs; at each the best 1/3 go on', or ""."""
    sweep = view.sweep
    if not sweep.rungs:
        return ""
    reached = [sum(str(e) in rungs_reached(view, t) for t in sweep.trials) for e in sweep.rungs]
    shares = [f"{sweep.counted.removesuffix('s')} {e}" for e in sweep.rungs]
    if sweep.varies_epochs:
        shares = [f"1/{sweep.eta ** (len(sweep.rungs) - i)} of a run's {sweep.counted}" for i in range(len(sweep.rungs))]
    shown = ", ".join(f"{share}: {n} runs" for share, n in zip(shares, reached, strict=True))
    return f"rungs: {shown}; at each the best 1/{sweep.eta} continue"


def trial_status(view: View, trial: Trial) -> dict[str, Any]:
    """Return one trial's state, progress, latest numbers and job as plain JSON values."""
    state, result = view.state(trial), view.result(trial)
    folder = view.sweep.trial_dir(trial)
    records = [] if state.ended or state is TrialState.waiting else view.records(trial, _TAIL_BYTES)
    step, past = latest(records, "step"), view.claims(trial)
    job = past[-1].slurm if past else None
    gpu_seconds = sum(claims.held_seconds(folder, c) * c.slurm.gpus for c in past if c.slurm)
    return {
        "signature": trial.signature,
        "number": trial.number,
        "name": trial.name,
        "setting": trial.label,  # keys of --json keep the names of version 0.1
        "seed": trial.seed,
        "state": state.name,
        "done": 1.0 if state is TrialState.completed else share_done(trial, step) if step else 0.0,
        "epoch": step.get("epoch"),
        "loss": step.get("loss"),
        "images_per_second": step.get("images_per_second"),
        "probe": latest(records, "probe").get(view.sweep.objective),
        "rungs": rungs_reached(view, trial) if view.sweep.rungs else {},
        "objective": view.objective(trial),
        "job": job.job if job else None,
        "node": job.node if job else None,
        "restarts": max(len(past) - 1, 0),
        "gpu_hours": gpu_seconds / 3600,
        "cause": view.damage(trial) or (result.cause if result else ""),
        "idle": idle_line(folder, past[-1].attempt) if state is TrialState.running else "",
        "refused": refusal.noted(folder, past[-1].attempt) if state is TrialState.running else "",
        "missing": result.missing if result else {},
        "skipped_images": result.skipped_images if result else _skipped_so_far(folder) if state is TrialState.running else 0,
        "warnings": [] if state is TrialState.waiting else [w.to_dict() for w in warnings_of(view, trial)],
    }


def _skipped_so_far(folder: Path) -> int:
    """Return how many images a run leaves out that has no result yet."""
    with suppress(ValueError):  # a damaged list, which ends the run itself
        return skipped.count(folder)
    return 0


def idle_line(folder: Path, attempt: int) -> str:
    """Return 'no step for 43 min, usually 0.8 s' if that is long for the run, or ""."""
    beat, now = pace.read(pace.file_of(folder, attempt)), time.time()
    return beat.line(now) if beat is not None and beat.is_late(now) else ""


def sweep_status(view: View) -> dict[str, Any]:
    """Return all trials and their counts by state."""
    keys = hyperparameters.columns(view.sweep.trials, view.sweep.search)
    trials = [{**trial_status(view, t), "hyperparameters": hyperparameters.chosen(t, keys)} for t in view.sweep.trials]
    counts = {state.name: sum(t["state"] == state.name for t in trials) for state in TrialState}
    counts[TrialState.damaged.name] += len(view.sweep.damaged)
    hours = sum(t["gpu_hours"] for t in trials)
    silent = view.watch.queue is not None and view.watch.queue.silent
    about = {
        "name": view.sweep.name,
        "scale": view.sweep.scale.name,
        "unit": view.sweep.task.UNIT,
        "counted": view.sweep.counted,
    }
    chosen = view.sweep.search
    search = None if chosen is None else {"sampler": chosen.sampler, "points": chosen.max_trials, "to_begin": Outlook(view).to_begin}
    waits = [{**asdict(w), "line": w.line} for w in waiting_jobs(view)]
    looked = {**about, "counts": counts, "gpu_hours": hours, "slurm_silent": silent, "trials": trials}
    noted = {"damaged": damaged_lines(view), "nodes": view.sweep.nodes.lines()}
    return {**looked, "waiting": waits, "to_go_on": to_go_on(view), "rungs": view.sweep.rungs, "search": search, **noted}


def waiting_jobs(view: View) -> list[Waiting]:
    """Return why the sweep's queued jobs wait, as far as Slurm says."""
    if view.watch.queue is None:
        return []
    try:
        return waiting(view.watch.queue.named(job_prefix(view.sweep)))
    except SlurmSilentError:
        return []


def to_go_on(view: View) -> str:
    """Return how many trials are left, and the command that goes on, if no job is there to run them, or "".

    Jobs submit what is left as they end. One that is killed outright where Slurm does not requeue
    cannot, and no other job may be left.
    """
    queue, states = view.watch.queue, view.states().values()
    left = sum(not state.settled for state in states) + (Outlook(view).to_begin if view.sweep.search is not None else 0)
    if queue is None or not left or any(state in (TrialState.running, TrialState.requeued) for state in states):
        return ""
    made = [s for s in Submission.readable_of(view.sweep)[0] if s.place is Place.here and not s.is_void]
    if not made:
        return ""
    claimed = (c.slurm for t in view.sweep.trials for c in view.claims(t)[-1:] if c.slurm)
    with suppress(SlurmSilentError):
        listed = any(not e.ended for e in queue.named(job_prefix(view.sweep)))
        young = min(s.age_seconds for s in made) < EMPTY_SECONDS  # it may not be listed yet
        if not (listed or young or queue.silent or any(queue.is_elsewhere(start.cluster) for start in claimed)):
            words = last_command(view.sweep.path)
            again = "run the sweep again from Python" if called_from_python(words) else in_words(words) if words else "the sweep's command"
            return f"{left} trials are left, and no job of this sweep is queued or runs; to go on: {again}"
    return ""


def damaged_lines(view: View) -> list[str]:
    """Return a line for each damaged trial, and for each choice of a search that cannot be read."""
    trials = [f"{t.label}, seed {t.seed}: {cause}" for t in view.sweep.trials if (cause := view.damage(t))]
    return [*trials, *(f"choice {number}: {cause}" for number, cause in view.sweep.damaged.items())]


def unlisted_line(view: View) -> str:
    """Return how many run folders belong to no trial, or ""."""
    names = view.unlisted()
    shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    return f"run folders of no trial, withdrawn from the sweep or without the file of their choice: {len(names)} ({shown})" if names else ""


def warning_lines(view: View, status: dict[str, Any]) -> list[str]:
    """Return the early warnings of all trials, one line each."""
    return as_lines(view.sweep, {t["signature"]: [w["line"] for w in t["warnings"]] for t in status["trials"]})


def skipped_lines(view: View, status: dict[str, Any]) -> list[str]:
    """Return how many images runs leave out and where they are listed, one line for all runs of a number."""
    runs: dict[int, list[str]] = {}
    for t in status["trials"]:
        runs.setdefault(t["skipped_images"], []).append(t["signature"])
    lines = []
    for count, names in sorted(runs.items()):
        others = f", and in {len(names) - 1} more runs" if len(names) > 1 else ""
        file = view.sweep.path / "trials" / names[0] / skipped.NAME
        lines += [f"{count:,} images cannot be decoded and are left out: {file}{others}"] if count else []
    return lines


def counts_line(status: dict[str, Any]) -> str:
    """Return '12 completed, 2 running, 8 waiting of 22 trials' and the GPU-hours used in Slurm."""
    shown = [f"{n} {name}" for name, n in status["counts"].items() if n]
    line = ", ".join(reversed(shown)) + f" of {len(status['trials'])} trials"
    if (search := status["search"]) is not None:
        line += f" (of up to {search['points']} configurations)"
    if status["gpu_hours"]:
        line += f", {status['gpu_hours']:.1f} GPU-hours used"
    return line + (" (Slurm does not answer; this is its last answer)" if status["slurm_silent"] else "")


_MOST_LINES = 40  # trials in a table of those that run or have failed


def live_table(status: dict[str, Any], minutes_left: float | None, width: int | None = None) -> Table:
    """Return a table of counts, with a line per trial that runs, waits for its job or has failed.

    It takes at most `width` characters, None for any number. Of many trials those that run come
    first, and a note counts the rest.
    """
    left = "" if minutes_left is None else f", about {minutes_left:.0f} min left"
    table = Table(title=f"{status['name']} ({status['scale']}): {counts_line(status)}{left}", title_justify="left")
    in_slurm = any(t["job"] for t in status["trials"])
    names = ["configuration", "seed", "state", "done", status["counted"].removesuffix("s"), "loss", "images/s", "probe", "restarts"]
    names += ["job", "node", "GPU-h"] if in_slurm else []
    active = [t for t in status["trials"] if t["state"] not in ("waiting", "completed", "pruned", "damaged")]
    if len(active) > _MOST_LINES:
        active.sort(key=lambda t: t["state"] == "failed")
        table.caption = f"{_MOST_LINES} of {len(active):,} such trials are shown; --json has all"
    rows, of_scores = [], score_format(status["unit"], 1)
    for t in active[:_MOST_LINES]:
        numbers = [
            (t["epoch"], ".1f" if status["counted"] == "epochs" else ",.0f"),
            (t["loss"], ".4f"),
            (t["images_per_second"], ".0f"),
            (t["probe"], of_scores),
        ]
        shown = ["" if value is None else f"{value:{form}}" for value, form in numbers]
        what = t["state"] if t["state"] != "failed" else f"failed: {t['cause']}"
        if t["idle"]:
            what += f", {t['idle']}"
        if t["refused"]:
            what += f", waits for the disk: {t['refused']}"
        row = [t["setting"], str(t["seed"]), what, f"{100 * t['done']:.0f} %", *shown, str(t["restarts"] or "")]
        rows.append([*row, *([t["job"] or "", t["node"] or "", f"{t['gpu_hours']:.2f}"] if in_slurm else [])])
    columns = [
        Column(
            name, [row[i] for row in rows], name in ("configuration", "state", "job", "node"), None if name == "state" else 3, keep=i < 4
        )
        for i, name in enumerate(names)
    ]
    return fitted(columns, width, table, "status --json has all")
