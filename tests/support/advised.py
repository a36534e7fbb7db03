"""Completed trials of a small sweep, and what sacct says of their jobs, for the tests of advice."""

from pathlib import Path
from typing import Any

from cnnjepa.run.folder import RunResult, RunStatus
from sweeps.spec.sweep import ScaleName, Trial, build_trials
from sweeps.state import claims
from sweeps.state.claims import SlurmStart
from sweeps.state.folder import Sweep
from tests.support.tiny_sweep import sweep


def planned(path: Path, *overrides: str, cluster: str = "local") -> Sweep:
    spec = sweep()
    trials = build_trials(spec, spec.smoke, 1, cluster, list(overrides))
    made = Sweep.of(spec, ScaleName.smoke, trials, path / "tiny_sweep-smoke")
    made.write()
    return made


def end(made: Sweep, trial: Trial, job: str = "", shared: bool = False, **values: Any) -> None:
    """A completed trial, claimed by a Slurm job where one is named."""
    start = SlurmStart("c", job, 0, "gpu01", 4, "log", "code", shared) if job else None
    owned = claims.claim(made.trial_dir(trial), 1, "d", 0, start)
    assert owned is not None
    with owned:
        made.run(trial).prepare(trial.config)
        result = RunResult(RunStatus.completed, metrics={made.objective: 50.0}, step=20, **values)
        made.run(trial).write_result(result)


LINES = """\
17_0|COMPLETED|00:20:00|16:00:00|01:40:00|64|1|256000M||
17_0.batch|COMPLETED|00:20:00||00:00.012|64|1||10568K|1
17_0.0|COMPLETED|00:20:00||01:40:00|64|1||3000000K|4
17_1|COMPLETED|00:24:00|16:00:00|02:00:00|64|1|256000M||
17_1.0|COMPLETED|00:24:00||02:00:00|64|1||3500000K|4
17_2|TIMEOUT|00:30:00|16:00:00|02:00:00|64|1|256000M||
"""
