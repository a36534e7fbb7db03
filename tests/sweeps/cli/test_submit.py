"""From a planned sweep to its jobs, without Slurm: hours by hand, kinds of runs, caps, and which allocation a command line asks for."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cnnjepa.run.folder import RunResult, RunStatus
from jobs.cluster import Allocation
from jobs.config import compose_job
from jobs.cost import Estimate
from sweeps.cli import estimate, local, submit
from sweeps.spec.sweep import ScaleName, Trial, build_trials
from sweeps.state import claims
from sweeps.state.claims import SlurmStart
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.searched import searched
from tests.support.tiny_sweep import sweep

CLUSTER = replace(compose_job(["cluster=test_cluster"]).cluster, gpus_per_trial=2, cores_per_trial=8, ranks_per_trial=2, max_parallel=2)
EPOCHS = 4  # of every trial of the tiny sweep


def planned(path: Path, *overrides: str, seeds: int = 1, **changes: Any) -> Sweep:
    """Configurations depth 1, depth 2 and pointwise of so many seeds, in a folder of their own."""
    spec = replace(sweep(), **changes)
    made = Sweep.of(spec, ScaleName.smoke, build_trials(spec, spec.smoke, seeds, "local", list(overrides)), path)
    made.write()
    return made


def end(made: Sweep, trial: Trial, hours: float, gpus: float | None, status: RunStatus = RunStatus.completed) -> None:
    """A result after so many hours of the clock, in a Slurm job that held `gpus`, or outside of Slurm."""
    start = None if gpus is None else SlurmStart("c", "7", 0, "gpu01", gpus, "log", "code")
    owned = claims.claim(made.trial_dir(trial), 1, "d", 0, start)
    assert owned is not None
    with owned:
        made.run(trial).prepare(trial.config)
        # The result's own device-hours are the trainer's count; an estimate goes by what the job held.
        made.run(trial).write_result(RunResult(status, seconds=hours * 3600, device_hours=99.0, metrics={made.objective: 50.0}))


def test_an_epochs_hours_are_those_of_all_devices_of_completed_slurm_runs_of_that_shape(tmp_path: Path) -> None:
    made = planned(tmp_path / "a", seeds=3)
    one, two, pointwise, failed, elsewhere, without, *_ = made.trials
    end(made, one, 6.0, gpus=2)
    end(made, two, 1.0, gpus=8)
    end(made, pointwise, 2.0, gpus=0.5)  # two share a GPU
    end(made, failed, 5.0, gpus=2, status=RunStatus.failed)
    end(made, elsewhere, 5.0, gpus=None)
    end(made, without, 3.0, gpus=0)  # no GPU: its 8 cores
    view = View(made)
    assert estimate.hours_of(view, one.values, CLUSTER) == [3.0, 2.0, 0.25, 6.0]
    assert estimate.hours_of(view, {**one.values, "precision": "bf16"}, CLUSTER) == []


def test_hours_are_measured_over_all_sweeps_of_the_folder_that_can_be_read(tmp_path: Path) -> None:
    first, second = planned(tmp_path / "a"), planned(tmp_path / "b", "data.train_limit=128")
    for i, made in enumerate((first, second)):
        for j, trial in enumerate(made.trials[:2]):
            end(made, trial, 1.0 + 2 * i + j, gpus=2)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sweep.json").write_text("{")
    assert estimate.measured_hours(tmp_path, first.trials[0].values, CLUSTER) == [0.5, 1.0]
    assert estimate.measured_hours(tmp_path, second.trials[0].values, CLUSTER) == [1.5, 2.0]
    assert estimate.measured_hours(tmp_path / "none", first.trials[0].values, CLUSTER) == []


def test_an_estimate_is_of_what_is_left_at_the_median_of_what_was_measured(tmp_path: Path) -> None:
    made = planned(tmp_path / "a", seeds=2)
    for trial, hours in zip(made.trials, (2.0, 4.0, 12.0), strict=False):  # 1, 2 and 6 GPU-hours an epoch
        end(made, trial, hours, gpus=2)
    end(made, made.trials[3], 1.0, gpus=2, status=RunStatus.failed)
    running = made.trials[4]
    assert claims.claim(made.trial_dir(running), 1, "d", 0)
    run = made.run(running)
    run.prepare(running.config)
    run.open_metrics(0)
    run.record("step", 15, {"epoch": 3.0, "loss": 1.0})
    run.close()
    price = estimate.estimate_of(View(made), CLUSTER, retry_failed=False)
    assert (price.trials, price.epochs, price.device_hours_per_epoch, price.device_hours) == (2, 5.0, 2.0, 10.0)
    assert (price.unit, price.at_most, price.parallel) == ("GPU-hours", False, 2)
    assert price.wall_hours == 4.0  # the run that has not begun: 8 GPU-hours on 2
    assert price.source == "measured by this code, median of 3 runs"
    again = estimate.estimate_of(View(made), CLUSTER, retry_failed=True)
    assert (again.trials, again.epochs) == (3, 9.0)


def test_a_search_is_estimated_as_if_nothing_were_stopped(tmp_path: Path) -> None:
    made = searched(tmp_path, [2], max_trials=3, seeds=2)
    price = estimate.estimate_of(View(made), CLUSTER, retry_failed=False)
    # The baseline, its second seed, and two configurations of two seeds.
    assert (price.trials, price.epochs, price.device_hours, price.at_most) == (6, 24.0, None, True)


def test_trials_are_priced_by_what_an_epoch_of_them_costs(tmp_path: Path) -> None:
    made = planned(tmp_path / "a", seeds=2)
    other = planned(tmp_path / "b", "data.train_limit=128")
    both = replace(made, trials=[made.trials[0], *other.trials, *made.trials[1:]])
    kinds = estimate.kinds_of(both)
    assert [[t.signature for t in kind] for kind in kinds] == [[t.signature for t in s.trials] for s in (made, other)]


def price(rate: float | None, unit: str = "GPU-hours") -> Estimate:
    return Estimate(1, 4.0, rate, "nowhere", unit, None, 1, 1, True)


def test_a_budget_pays_for_one_run_at_least(tmp_path: Path) -> None:
    made = searched(tmp_path, budget_hours=10.0)
    estimate.check_budget(made, price(2.5))  # 4 epochs: exactly
    estimate.check_budget(made, price(None))
    with pytest.raises(ValueError, match=r"--budget-gpu-hours must be at least the 10\.4 GPU-hours of one run; got 10"):
        estimate.check_budget(made, price(2.6))
    estimate.check_budget(planned(tmp_path / "a"), price(1e9))
    assert estimate.budget_of(made) == 10.0
    assert estimate.budget_of(planned(tmp_path / "a")) is None


def asked(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"backend": None, "nodes": None, "trials_per_node": None, "yes": False, **values})


def test_an_allocation_is_what_the_command_line_asks_for_and_nothing_else() -> None:
    assert submit.allocation_of(asked(), CLUSTER) is None
    assert submit.allocation_of(asked(backend="array"), CLUSTER) is None
    local.check(asked())
    assert submit.allocation_of(asked(backend="allocation", nodes=3), CLUSTER) == Allocation(3, 2)
    assert submit.allocation_of(asked(backend="allocation", nodes=3, trials_per_node=4), CLUSTER) == Allocation(3, 4)
    alone = "must come with --backend allocation on a Slurm cluster; got 2"
    elsewhere = "--backend must be left out on this machine, where Ray Tune places the trials; got array"
    for refused, given, message in (
        (on_slurm, {"backend": "allocation"}, "--nodes must be given with --backend allocation; got none"),
        (on_slurm, {"nodes": 2}, f"--nodes {alone}"),
        (on_slurm, {"backend": "array", "trials_per_node": 2}, f"--trials-per-node {alone}"),
        (local.check, {"backend": "allocation", "nodes": 2}, f"--nodes {alone}"),
        (local.check, {"backend": "array"}, elsewhere),
    ):
        with pytest.raises(ValueError, match=message):
            refused(asked(**given))


def on_slurm(of: argparse.Namespace) -> Allocation | None:
    return submit.allocation_of(of, CLUSTER)


@pytest.mark.parametrize(("said", "agrees"), [("y", True), (" YES ", True), ("", False), ("n", False), ("yesterday", False)])
def test_a_person_is_asked_and_a_script_is_not(said: str, agrees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[str] = []

    def answer(question: str) -> str:
        questions.append(question)
        return said

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(submit.sys.stdin, "isatty", lambda: True, raising=False)
    assert submit.confirmed(asked()) is agrees
    assert questions == ["submit? [y/N] "]
    assert submit.confirmed(asked(yes=True))
    monkeypatch.setattr(submit.sys.stdin, "isatty", lambda: False, raising=False)
    assert submit.confirmed(asked())
    assert len(questions) == 1
