"""Tell all about one trial: scores, configuration, what differs, attempts, how to run it alone."""

import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cnnjepa.run.attempts import newest
from cnnjepa.run.files import read_json, tail
from cnnjepa.run.folder import RunResult
from cnnjepa.run.identity import DEFAULT_TASK, leaves, task_name
from jobs import program
from jobs.cli import printable
from jobs.task import score_format
from sweeps.report.aggregate import in_units
from sweeps.spec import hyperparameters
from sweeps.spec.sweep import Trial
from sweeps.state import claims
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

_LOG_BYTES, _LOG_LINES = 20_000, 10


@dataclass(frozen=True)
class Attempt:
    """One start of a trial: where and when it ran, and how it ended."""

    attempt: int
    node: str
    job: str | None  # of Slurm
    started: str
    seconds: float
    end: str  # completed, failed, pruned, running, requeued, stopped, error or died
    cause: str


def attempts(view: View, trial: Trial) -> list[Attempt]:
    """Return the attempts at a trial, oldest first; of one that left no cause, `cause` is ""."""
    folder, past = view.sweep.trial_dir(trial), view.claims(trial)
    names, state, causes = claims.listing(folder), view.state(trial), _causes(view, trial)
    found = []
    for claim in past:
        ways = {"released": "stopped", "crashed": "error"}
        end = next((word for way, word in ways.items() if f"{claim.attempt:06d}.{way}" in names), "died")
        status, cause = causes.get(claim.attempt, ("", ""))
        if claim is past[-1] and state in (TrialState.running, TrialState.requeued):
            end = state.name
        node = claim.slurm.node if claim.slurm else claim.owner.host
        started = time.strftime("%F %H:%M", time.localtime(claim.time))
        seconds = claims.held_seconds(folder, claim)
        found.append(Attempt(claim.attempt, node, claim.slurm.job if claim.slurm else None, started, seconds, status or end, cause))
    return found


def _causes(view: View, trial: Trial) -> dict[int, tuple[str, str]]:
    """Return attempt -> how it ended and why, from its result and from the faults of nodes."""
    found = {f.attempt: ("", f.cause) for f in view.sweep.nodes.read()[0] if f.trial == trial.signature}
    for path in sorted(view.sweep.trial_dir(trial).glob("result*.json")):
        try:
            result = RunResult.from_dict(read_json(path))
        except (ValueError, TypeError, KeyError, OSError):
            continue  # a damaged result is the trial's damage, which is told
        found[result.claim] = result.status.name, result.cause
    return found


def alone(view: View, trial: Trial) -> str:
    """Return the command that runs the trial alone, quoted for a shell; raise ValueError if there is none."""
    words = ["python", "-m", "jobs.pretrain"]
    if program.is_foreign(view.sweep.task.name):  # found in the sweep's own copy of the program
        return shlex.join([*words, "--like", str(view.sweep.path / trial.name)])
    from jobs.like import overrides_of  # Hydra is slow to import

    return shlex.join([*words, *overrides_of(trial.config, trial.overrides)])


def differing(own: Mapping[str, Any], other: Mapping[str, Any], seeds: bool) -> dict[str, list[Any]]:
    """Return key -> its value in `other` and in `own`, None without one, where they differ; their seeds only if `seeds` is set."""
    mine, theirs = dict(leaves(own)), dict(leaves(other))
    keys = [key for key in {**theirs, **mine} if seeds or key != "seed"]
    return {key: [theirs.get(key), mine.get(key)] for key in keys if theirs.get(key) != mine.get(key)}


def about(view: View, trial: Trial, other: Trial | None = None) -> dict[str, Any]:
    """Return all about a trial as JSON values; `differences` are from `other`, or from the sweep's base."""
    result, folder, search = view.result(trial), view.sweep.trial_dir(trial), view.sweep.search
    first = view.sweep.trials[0]
    base = f"the configuration without changes, {first.label}" if search is not None else f"the first configuration, {first.label}"
    against = other.values if other is not None else first.values
    log = newest(folder / "log" / "train.log")
    command, why = "", ""
    try:
        command = alone(view, trial)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        why = str(error)
    return {
        "number": trial.number,
        "name": trial.name,
        "run_id": trial.signature,
        "configuration": trial.label,
        "seed": trial.seed,
        "state": view.state(trial).name,
        "cause": view.damage(trial) or (result.cause if result else ""),
        "metrics": result.metrics if result else {},
        "scores": [name for name in result.metrics if name in result.images or not result.images] if result else [],
        "missing": result.missing if result else {},
        "step": result.step if result else None,
        "seconds": result.seconds if result else None,
        "device_hours": view.device_hours(trial),
        "hyperparameters": dict(leaves(trial.values)),
        "other": other.name if other is not None else base,
        "metrics_of_other": found.metrics if other is not None and (found := view.result(other)) else {},
        "differences": differing(trial.values, against, other is not None),
        "command": command,
        "no_command": why,
        "folder": str(folder),
        "log": str(log) if log.exists() else None,
        "log_tail": log_tail(log),
        "attempts": [asdict(a) for a in attempts(view, trial)],
    }


def log_tail(log: Path) -> list[str]:
    """Return the last lines of a log, [] without one."""
    try:
        lines = tail(log, _LOG_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-_LOG_LINES:]


def lines(view: View, trial: Trial, found: Mapping[str, Any]) -> list[str]:
    """Return what `about` has found as lines for a terminal."""
    shown = [f"{found['name']}: {found['state']}{': ' * bool(found['cause'])}{found['cause']}"]
    shown += [f"  {found['configuration']}, seed {found['seed']}; run ID {found['run_id']}"]
    form, theirs = score_format(view.sweep.task.UNIT), found["metrics_of_other"]
    for name, value in found["metrics"].items():
        digits = form if name in found["scores"] else ".4g"  # what rests on no images is no percentage
        number = in_units(view, f"{value:{form}}") if name in found["scores"] else f"{value:.4g}"
        shown.append(f"  {name} = {number}" + (f"; {found['other']}: {theirs[name]:{digits}}" if name in theirs else ""))
    shown += [f"  {name} has no value: {cause}" for name, cause in found["missing"].items()]
    if found["seconds"]:
        shown.append(f"  {found['step']:,} steps, {_duration(found['seconds'])}, {found['device_hours']:.3g} device-hours")
    keys = hyperparameters.columns(view.sweep.trials, view.sweep.search)
    shown += ["configuration"] + [f"  {key} = {_text(value)}" for key, value in hyperparameters.chosen(trial, keys).items()]
    shown.append(f"  and {len(found['hyperparameters']) - len(hyperparameters.chosen(trial, keys))} more keys, in --json")
    changed = [f"  {key}: {_text(a)} -> {_text(b)}" for key, (a, b) in found["differences"].items()]
    shown += [f"what differs from {found['other']}", *(changed or ["  nothing"])]
    shown += ["attempts", *([_attempt(a) for a in found["attempts"]] or ["  none yet"])]
    shown += ["to run it alone", f"  {found['command'] or found['no_command']}"]
    if found["state"] == TrialState.completed.name and task_name(trial.values) == DEFAULT_TASK:
        named = f"{view.sweep.path}/{trial.number}"
        words = [f"  python -m jobs.export {shlex.quote(named)}", f"  python -m jobs.probe {shlex.quote(named)}"]
        shown += ["to export its encoder, or compute further scores", *words]
    shown += ["folder", f"  {found['folder']}", "log", f"  {found['log'] or 'none yet'}"]
    return [printable(line) for line in [*shown, *(f"  | {line}" for line in found["log_tail"])]]


def _attempt(a: Mapping[str, Any]) -> str:
    where = f"{a['node']}{', job ' + a['job'] if a['job'] else ''}"
    return f"  {a['attempt']}: {a['started']}, {where}, {_duration(a['seconds'])}: {a['end']}{': ' * bool(a['cause'])}{a['cause']}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _text(value: Any) -> str:
    return "none" if value is None else str(hyperparameters.cell(value))
