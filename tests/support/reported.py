"""Sweep folders whose runs have ended, as a report reads them."""

import dataclasses
import json
import re
from pathlib import Path

from cnnjepa.run.folder import RunResult, RunStatus
from sweeps.spec.sweep import Configuration, ScaleName, build_trials
from sweeps.state import claims
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.tiny_sweep import sweep

OBJECTIVE, LINEAR, KNN = "linear.holdout_top1", "linear.test_top1", "knn.test_top1"


def made(path: Path, scores: dict[str, list[float]], configurations: list[Configuration] | None = None, seeds: int = 3) -> View:
    """A sweep whose runs have those scores by configuration, one a seed; what is beyond them has not begun."""
    spec = dataclasses.replace(sweep(), configurations=configurations or sweep().configurations)
    found = Sweep.of(spec, ScaleName.paper, build_trials(spec, spec.paper, seeds, "local", []), path)
    found.write()
    for trial in found.trials:
        mine = scores.get(trial.label, [])[trial.seed - 42 :][:1]
        if not mine:
            continue
        run = found.run(trial)
        run.prepare(trial.config)
        run.open_metrics(0)
        for step in range(1, 4):
            run.record("step", step, {"epoch": step / 2, "loss": 1 / step, "gradient_norm": float("nan")})
        run.close()
        metrics = {OBJECTIVE: mine[0], LINEAR: mine[0] - 1, KNN: mine[0] - 10}
        run.write_result(RunResult(RunStatus.completed, metrics=metrics, step=3, parameters=1234, device_hours=0.5, seconds=1800.0))
    return View(found)


def failed(view: View, number: int, cause: str, log: str = "") -> None:
    trial = view.sweep.trials[number]
    run = view.sweep.run(trial)
    run.prepare(trial.config)
    (run.logs / "train.log").write_text(log)
    run.write_result(RunResult(RunStatus.failed, cause, device_hours=0.25))


def embedded(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


CLEAR = {"depth 1": [60.0, 61.0, 60.5], "depth 2": [75.2, 76.0, 75.4], "pointwise": [61.0, 60.2, 61.4]}
ALIKE = {"depth 1": [70.0, 72.0, 71.0], "depth 2": [71.0, 70.5, 72.0], "pointwise": [50.0, 51.0, 50.5]}


def claimed(view: View, number: int, epoch: int, gpus: float) -> None:
    start = claims.SlurmStart("mini", "7_0", 0, f"gpu0{epoch}", gpus, "/none/job.log", "/code")
    assert claims.claim(view.sweep.trial_dir(view.sweep.trials[number]), epoch, "d", 0, start)


def provenance(folder: Path) -> None:
    """Write provenance.json as a run does."""
    from jobs.provenance import record

    record(folder)
