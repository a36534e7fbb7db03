"""A sweep's folder whose trials have curves, scores, claims and provenance, and have ended in every way; nothing is trained."""

from pathlib import Path

import pytest

from cnnjepa.run.files import sealed_json, write_atomic
from cnnjepa.run.folder import RunResult, RunStatus
from sweeps.spec.sweep import ScaleName, Trial, build_trials
from sweeps.state import claims
from sweeps.state.folder import Sweep
from tests.support.tiny_sweep import sweep

OBJECTIVE, LINEAR = "linear.holdout_top1", "linear.test_top1"
CODE = "0123456789ab"


def end(made: Sweep, trial: Trial, status: RunStatus | None, steps: int = 6) -> None:
    """Give the trial a claim, records of `steps` steps, and, with a status, a result."""
    folder = made.run(trial)
    folder.prepare(trial.config)
    folder.open_metrics(0)
    for step in range(1, steps + 1):
        folder.record("step", step, {"epoch": step / 3, "loss": 1 / (step + trial.number + 1), "images_per_second": 100.0 + step / 7})
    folder.record("probe", 3, {"epoch": 1.0, OBJECTIVE: 100 / (3 + trial.number)})
    folder.close()
    about = {"command": ["python", "sweeps/tiny_sweep.py", "--cluster", "local"], "commit": "c0ffee", "diff": "", "host": "node7"}
    about |= {"code": f"{made.path}/code/{CODE}", "python": "3.11.7", "packages": {"torch": "2.14.1"}}
    write_atomic(folder.path / "provenance.json", sealed_json(about))
    write_atomic(folder.path / "log" / "train.log", "step 6/6\n")
    if status is None:
        return
    scores = {OBJECTIVE: 200 / (7 + trial.number), LINEAR: 100 / (1.7 + trial.number)} if status is RunStatus.completed else {}
    cause = "" if status is RunStatus.completed else "NonFiniteError: loss nan" if status is RunStatus.failed else "rung at epoch 1"
    folder.write_result(RunResult(status, cause, scores, step=steps, seconds=1 / 3, device_hours=0.1 / 3, parameters=1234, claim=1))


def claim(made: Sweep, trial: Trial) -> None:
    """Let this process have begun the trial once."""
    with claims.claim(made.trial_dir(trial), 1, "driver", 0) or pytest.fail("claimed"):
        pass


ENDS = [RunStatus.completed, RunStatus.failed, RunStatus.pruned, None]


def swept(path: Path) -> Sweep:
    """Four trials: one completed, one failed, one was pruned and one has not begun."""
    spec = sweep()
    made = Sweep.of(spec, ScaleName.paper, build_trials(spec, spec.paper, 2, "local", [])[: len(ENDS)], path)
    made.write()
    for trial, status in zip(made.trials, ENDS):
        if status is not None:
            claim(made, trial)
            end(made, trial, status)
    return made
