"""Report a sweep's state from its run folders and Slurm."""

import datetime
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cnnjepa.run import pace, refusal, skipped
from jobs.slurm.queue import EMPTY_SECONDS, SlurmSilentError
from jobs.slurm.waiting import Waiting, waiting
from sweeps.report.aggregate import Leader, Summary, judged, leader_of, summaries
from sweeps.report.best import score_of_best
from sweeps.report.clocks import clock_of, estimated, running_of
from sweeps.report.remaining import Running
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


def best_line(view: View, lead: Leader | None = None) -> str:
    """Return 'best so far by knn: lr 0.003: 71.2 % (95 % interval 70.1 to 72.3); next: ...', or ""; `lead` is the leader, if known."""
    objective = view.sweep.objective
    lead = lead or leader_of(view, summaries(view), objective)
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


def trial_status(view: View, trial: Trial, running: dict[str, Running] | None = None) -> dict[str, Any]:
    """Return one trial's state, progress, latest numbers and job as plain JSON values; note its pace in `running` if it runs."""
    state, result = view.state(trial), view.result(trial)
    folder = view.sweep.trial_dir(trial)
    records = [] if state.ended or state is TrialState.waiting else view.records(trial, _TAIL_BYTES)
    step, past = latest(records, "step"), view.claims(trial)
    job = past[-1].slurm if past else None
    gpu_seconds = sum(claims.held_seconds(folder, c) * c.slurm.gpus for c in past if c.slurm)
    clock = clock_of(view, trial, state, past)
    if running is not None and state is TrialState.running:
        steps = [r for r in records if r["kind"] == "step"][-2:]
        running[trial.signature] = running_of(view, trial, clock, steps, past[-1].step if past else 0)
    return {
        "signature": trial.signature,
        "number": trial.number,
        "name": trial.name,
        "setting": trial.label,  # keys of --json keep the names of version 0.1
        "seed": trial.seed,
        "state": state.name,
        "done": 1.0 if state is TrialState.completed else share_done(trial, step) if step else 0.0,
        "epoch": step.get("epoch"),
        "length": trial.epochs,
        "loss": step.get("loss"),
        "images_per_second": step.get("images_per_second"),
        "probe": latest(records, "probe").get(view.sweep.objective),
        "rungs": rungs_reached(view, trial) if view.sweep.rungs else {},
        "objective": view.objective(trial),
        "job": job.job if job else None,
        "node": job.node if job else None,
        "restarts": max(len(past) - 1, 0),
        "gpu_hours": gpu_seconds / 3600,
        "device_hours": view.device_hours(trial) if result else None,
        "seconds": clock.seconds,
        "ended": clock.end or None,
        "phase": clock.phase,
        "last_step": clock.last_step or None,
        "cause": view.damage(trial) or (result.cause if result else ""),
        "idle": idle_line(clock.beat),
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


def idle_line(beat: pace.Beat | None) -> str:
    """Return 'no step for 43 min, usually 0.8 s' if that is long for the run, or ""."""
    now = time.time()
    return beat.line(now) if beat is not None and beat.is_late(now) else ""


def sweep_status(view: View, workers: int = 0) -> dict[str, Any]:
    """Return all trials, their counts by state, and the time left; `workers` is how many trials run at once, if that is known."""
    running: dict[str, Running] = {}
    trials = [trial_status(view, t, running) for t in view.sweep.trials]
    outlook = Outlook(view) if view.sweep.search is not None else None
    left = estimated(view, trials, running, workers, outlook)
    counts = {state.name: sum(t["state"] == state.name for t in trials) for state in TrialState}
    counts[TrialState.damaged.name] += len(view.sweep.damaged)
    hours = sum(t["gpu_hours"] for t in trials)
    silent = view.watch.queue is not None and view.watch.queue.silent
    about = {
        "name": view.sweep.name,
        "scale": view.sweep.scale.name,
        "unit": view.sweep.task.UNIT,
        "counted": view.sweep.counted,
        "sign": view.sweep.sign,
    }
    chosen = view.sweep.search
    search = (
        None
        if chosen is None or outlook is None
        else {"sampler": chosen.sampler, "points": chosen.max_trials, "to_begin": outlook.to_begin}
    )
    waits = [{**asdict(w), "line": w.line} for w in waiting_jobs(view)]
    looked = {**about, "counts": counts, "gpu_hours": hours, "seconds_left": left, "slurm_silent": silent, "trials": trials}
    noted = {"damaged": damaged_lines(view), "nodes": view.sweep.nodes.lines()}
    return {**looked, "waiting": waits, "to_go_on": to_go_on(view), "rungs": view.sweep.rungs, "search": search, **noted}


def in_full(view: View) -> dict[str, Any]:
    """Return `sweep_status` with the hyperparameters of each trial, which take too long to list at each look."""
    found = sweep_status(view)
    keys = hyperparameters.columns(view.sweep.trials, view.sweep.search)
    for trial, t in zip(view.sweep.trials, found["trials"], strict=False):
        t["hyperparameters"] = hyperparameters.chosen(trial, keys)
    return found


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
    trials = [f"{t.name}: {cause}" for t in view.sweep.trials if (cause := view.damage(t))]
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


def counts_line(status: Mapping[str, Any]) -> str:
    """Return '12 completed, 2 running, 8 waiting of 22 trials' and the GPU-hours used in Slurm."""
    shown = [f"{n} {name}" for name, n in status["counts"].items() if n]
    line = ", ".join(reversed(shown)) + f" of {len(status['trials'])} trials"
    if (search := status["search"]) is not None:
        line += f" (of up to {search['points']} configurations)"
    if status["gpu_hours"]:
        line += f", {status['gpu_hours']:.1f} GPU-hours used"
    return line + (" (Slurm does not answer; this is its last answer)" if status["slurm_silent"] else "")
