"""Searches whose runs end with scores that a test makes up."""

from collections.abc import Callable
from pathlib import Path

import optuna

from cnnjepa.run.folder import RunResult, RunStatus
from sweeps.execution.scheduler import next_claim
from sweeps.spec.space import baseline
from sweeps.spec.sweep import FIRST_SEED, ScaleName, SweepSpec, Trial, build_search
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.tiny_search import SWEEP

OBJECTIVE = "linear.holdout_top1"
State = optuna.trial.TrialState


def searched(path: Path, rungs: list[int] | None = None, eta: int = 3, spec: SweepSpec = SWEEP, **changes: object) -> Sweep:
    """A search in `path` whose trial 0 is there; `changes` are of how it chooses."""
    rungs = [] if rungs is None else rungs
    options: dict = {"sampler": "random", "max_trials": 12, "seeds": 1, **changes}
    chosen = build_search(spec, spec.scale(ScaleName.smoke), "local", [], rungs, **options)
    first = chosen.trial(0, 0, baseline(chosen.space, chosen.base), FIRST_SEED)
    made = Sweep.of(spec, ScaleName.smoke, [first], path / "tiny_search-smoke", chosen, rungs, eta)
    made.write()
    return made


def end(
    made: Sweep, trial: Trial, score: float | None, status: RunStatus = RunStatus.completed, hours: float = 0.0, **probes: float
) -> None:
    """Give the trial a result; `probes` are scores on the way by epoch, such as e2=40.0."""
    metrics = {} if score is None else {OBJECTIVE: score}
    on_the_way = {epoch[1:]: {OBJECTIVE: value} for epoch, value in probes.items()}
    folder = made.run(trial)
    folder.prepare(trial.config)
    folder.write_result(RunResult(status, metrics=metrics, probes=on_the_way, device_hours=hours))


def run_to_the_end(made: Sweep, score: Callable[[Trial], float], hours: float = 0.0, limit: int = 100) -> list[Trial]:
    """One worker after the other, each trial ending at once; returns the trials in the order of their begin."""
    begun = []
    view = View(made)
    while (got := next_claim(view, Process.me().driver)) is not None:
        with got[1]:
            end(made, got[0], score(got[0]), hours=hours)
        begun.append(got[0])
        assert len(begun) < limit
    return begun
