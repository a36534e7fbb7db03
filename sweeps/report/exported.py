"""What a sweep gives to an experiment tracker: a run per trial, as plain values that no tracker's library is needed for."""

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cnnjepa.run.attempts import newest
from cnnjepa.run.files import read_json, reading
from cnnjepa.run.identity import leaves
from sweeps.report.aggregate import Row, rows
from sweeps.spec.sweep import Trial
from sweeps.state.damage import cause_of
from sweeps.state.history import commands, in_words
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

TAG = "sweep."  # begins the names of all tags, so that a tracker's own and the user's stay apart
KEY, DIGEST = f"{TAG}key", f"{TAG}digest"
# Of a sweep's folder, and of a trial's.
TABLES = ("results.csv", "summary.csv", "ablation.png", "sweep.json")
FILES = ("config.yaml", "metrics.jsonl", "result.json", "provenance.json")


@dataclass(frozen=True)
class Point:
    """A recorded number, named as in TensorBoard."""

    name: str
    step: int
    value: float


@dataclass(frozen=True)
class ExportedRun:
    """One trial as a tracker gets it."""

    key: str  # tells the trial from all others: the sweep's name and the run ID
    name: str
    configuration: str  # label, the same for all seeds
    state: TrialState
    params: dict[str, Any]  # full key -> value
    points: list[Point]  # curves, in the order of their steps
    last_step: int
    scores: dict[str, float]  # final scores and costs, by the columns of results.csv
    tags: dict[str, str]
    began: float  # seconds since the Unix epoch
    ended: float
    files: list[Path]

    @property
    def digest(self) -> str:
        """Return 16 hex digits of all that is exported; an export that repeats it has nothing to do."""
        said = {**asdict(self), "state": self.state.name, "files": [(str(f), f.stat().st_mtime_ns) for f in self.files]}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def exported_runs(view: View) -> tuple[list[ExportedRun], list[str]]:
    """Return a run for each trial that has begun, in the sweep's order, and lines about the others."""
    view.states()
    table = list(zip(view.sweep.trials, rows(view), strict=True))
    begun = [(trial, row) for trial, row in table if row.state is not TrialState.waiting]
    left = len(table) - len(begun)
    lines = [f"left out, since they have not begun: {left} trials; the same command adds them later"] if left else []
    return [exported(view, trial, row) for trial, row in begun], lines


def exported(view: View, trial: Trial, row: Row) -> ExportedRun:
    """Return one trial as a tracker gets it."""
    folder, past, result = view.sweep.trial_dir(trial), view.claims(trial), view.result(trial)
    records = [] if view.damage(trial) else view.records(trial)
    points = curves(records)
    last = max([p.step for p in points] + ([result.step] if result is not None else [0]))
    files = [path for path in [*(folder / name for name in FILES), newest(folder / "log" / "train.log")] if path.is_file()]
    stamps = [f.stat().st_mtime for f in files]
    began = past[0].time if past else min(stamps, default=0.0)
    ended = view.sweep.run(trial).ended_at() or max([began, *stamps])
    return ExportedRun(
        key=f"{view.sweep.path.name}/{trial.signature}",
        name=trial.name,
        configuration=trial.label,
        state=row.state,
        params=dict(leaves(trial.values)),
        points=points,
        last_step=last,
        scores={**row.metrics, **row.costs},
        tags=tags_of(view, trial, row),
        began=began,
        ended=max(ended, began),
        files=files,
    )


def curves(records: list[dict[str, Any]]) -> list[Point]:
    """Return the numbers of the steps and probes among a run's records, named as in TensorBoard: step/loss, probe/knn.holdout_top1.

    The epoch of each step is a curve too. What a record says twice for a step, as after a resume, its last value counts.
    """
    found: dict[tuple[str, int], float] = {}
    for record in records:
        kind, step = record["kind"], record["step"]
        if kind not in ("step", "probe"):
            continue
        found["epoch", step] = float(record["epoch"])
        for key, value in record.items():
            if key not in ("kind", "step", "epoch") and value is not None:
                found[f"{kind}/{key}", step] = float(value)
    return [Point(name, step, value) for (name, step), value in sorted(found.items(), key=lambda item: item[0][1])]


def tags_of(view: View, trial: Trial, row: Row) -> dict[str, str]:
    """Return where a trial stands and came from, as texts; what is unknown is left out."""
    past, folder = view.claims(trial), view.sweep.trial_dir(trial)
    nodes = dict.fromkeys(c.slurm.node if c.slurm else c.owner.host for c in past)
    jobs = dict.fromkeys(c.slurm.job for c in past if c.slurm)
    found = {
        "name": view.sweep.path.name,
        "question": view.sweep.question,
        "run_id": trial.signature,
        "configuration": trial.label,
        "seed": str(trial.seed),
        "state": row.state.name,
        "cause": row.cause,
        "objective": view.sweep.objective,
        "overrides": shlex.join(trial.overrides),
        "attempts": str(len(past)),
        "nodes": ", ".join(nodes),
        "jobs": ", ".join(jobs),
        "folder": str(folder),
        **_provenance(folder),
    }
    return {f"{TAG}{name}": value for name, value in found.items() if value}


def _provenance(folder: Path) -> dict[str, str]:
    """Return command, commit, code snapshot, host and versions of a run, as its provenance.json says."""
    path = folder / "provenance.json"
    if not path.exists():
        return {}
    try:
        with reading(path):
            known = read_json(path)
    except ValueError as error:
        return {"provenance": cause_of(error, folder)}
    code = Path(str(known.get("code", "")))
    packages = known.get("packages")
    return {
        "command": in_words(known.get("command", "")),
        "commit": str(known.get("commit", "")),
        "uncommitted_changes": "yes" if known.get("diff") else "no",
        "code": code.name if code.parent.name == "code" else "",  # of the snapshot that ran, else the commit and the changes say it
        "host": str(known.get("host", "")),
        "python": str(known.get("python", "")),
        "packages": ", ".join(f"{n} {v}" for n, v in packages.items() if v) if isinstance(packages, dict) else "",
    }


def sweep_tags(view: View) -> dict[str, str]:
    """Return what is said of the sweep as a whole."""
    typed = [in_words(found["command"]) for found in commands(view.sweep.path)]
    about = {"name": view.sweep.path.name, "question": view.sweep.question, "objective": view.sweep.objective}
    about |= {"command": typed[-1] if typed else "", "folder": str(view.sweep.path), "is": "sweep"}
    return {f"{TAG}{name}": value for name, value in about.items() if value}


def tables_of(view: View) -> list[Path]:
    """Return the sweep's tables and figures that are there; `tables.write_all` makes them."""
    return [path for name in TABLES if (path := view.sweep.path / name).is_file()]
