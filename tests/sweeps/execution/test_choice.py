"""Which trial a worker in a Slurm job takes, and when a half-done one is given up."""

from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa.run.folder import RunStatus
from jobs.slurm.queue import GONE
from sweeps.execution import scheduler
from sweeps.execution.scheduler import next_claim
from sweeps.spec.sweep import ScaleName, Trial
from sweeps.state import claims
from sweeps.state.claims import Process, SlurmStart
from sweeps.state.folder import Sweep
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

START = SlurmStart("mini", "7_3", 0, "gpu01", 4, "/none/job.log", "/code")


class Over:
    """A Slurm in which every job is over."""

    silent = False

    def is_elsewhere(self, cluster: str) -> bool:
        return False

    def state(self, job: str) -> str:
        return "NODE_FAIL"


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setattr(scheduler, "runnable", lambda trial: trial.label != "later code's")
    trials = [Trial(i, f"s{i}", 42, {"epochs": 1}, f"trial{i}") for i in range(3)]
    return Sweep(tmp_path, "x", "?", ScaleName.smoke, "linear.holdout_top1", [], {}, trials)


def left_behind(sweep: Sweep, number: int, *starts: SlurmStart, driver: str = "") -> None:
    """Claims of jobs that Slurm has ended."""
    for epoch, start in enumerate(starts, start=1):
        assert claims.claim(sweep.trial_dir(sweep.trials[number]), epoch, driver or start.driver, 0, start)


def view_of(sweep: Sweep) -> View:
    return View(sweep, queue=Over())  # type: ignore[arg-type]


@pytest.mark.parametrize("starts", [9, 10])
def test_ten_jobs_that_gain_no_step_are_enough(sweep: Sweep, starts: int) -> None:
    """Each is another start of the job, ended by the machine: no fault of the trial, but so many are one of the time limit."""
    left_behind(sweep, 0, *(replace(START, restart=i) for i in range(starts)))
    got = next_claim(view_of(sweep), "d", replace(START, job="8_0"))
    assert got is not None
    result = sweep.run(sweep.trials[0]).result()
    if starts < 10:
        assert (got[0].number, got[1].claim.attempt, result) == (0, 10, None)
        return
    assert got[0].number == 1
    assert result is not None
    assert (result.status, result.claim, result.step) == (RunStatus.failed, 10, 0)
    assert result.cause.startswith("10 jobs made no progress after step 0; is the time limit too short? ")
    assert result.cause.endswith("see /none/job.log")


def test_a_job_that_was_requeued_finds_its_own_trial_first(sweep: Sweep) -> None:
    left_behind(sweep, 0, replace(START, job="5_0"))
    left_behind(sweep, 2, START)
    got = next_claim(view_of(sweep), "d", replace(START, restart=1))
    assert got is not None
    assert got[0].number == 2
    other = next_claim(view_of(sweep), "d", replace(START, job="9_9"))
    assert other is not None
    assert other[0].number == 0


@pytest.mark.parametrize("shared", [False, True])
def test_after_its_own_trials_fault_a_job_tries_no_other_unless_it_has_many(sweep: Sweep, shared: bool) -> None:
    """The fault may be the node's."""
    mine = replace(START, shared=shared)
    left_behind(sweep, 0, mine, mine, driver="d")
    got = next_claim(view_of(sweep), "d", replace(mine, restart=1))
    result = sweep.run(sweep.trials[0]).result()
    assert result is not None
    assert result.cause.startswith("its process died 2 times at step 0 without gaining a step")
    log = str(sweep.trial_dir(sweep.trials[0]) / "log" / "train.log") if shared else "/none/job.log"
    assert result.cause.endswith(f"; see {log}")
    assert (got is None) is not shared


def test_what_later_code_has_planned_is_left_to_it(sweep: Sweep) -> None:
    sweep.trials[0] = replace(sweep.trials[0], label="later code's")
    sweep.trials[1] = replace(sweep.trials[1], label="later code's")
    left_behind(sweep, 1, START)
    got = next_claim(view_of(sweep), "d", None)
    assert got is not None
    assert got[0].number == 2
    assert next_claim(view_of(sweep), "d", None) is None
    assert claims.history(sweep.trial_dir(sweep.trials[0])) == []


def test_a_trial_that_was_cancelled_while_it_was_chosen_is_given_back(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = sweep.trials
    monkeypatch.setattr(scheduler, "not_begun", lambda view: iter([first, second]))
    claims.cancel(sweep.trial_dir(first))
    got = next_claim(View(sweep), "d")
    assert got is not None
    assert got[0] is second
    assert (sweep.trial_dir(first) / "claim" / "000001.released").exists()


class Listed(Over):
    """Jobs in their states; the others are gone."""

    def __init__(self, **states: str) -> None:
        self._states = states

    def state(self, job: str) -> str:
        return self._states.get(f"j{job}", GONE)

    def restarts(self, job: str) -> int:
        return 0


def test_a_living_job_keeps_its_trial(sweep: Sweep) -> None:
    for number, job in enumerate("123"):
        left_behind(sweep, number, replace(START, job=job))
    view = View(sweep, queue=Listed(j1="RUNNING", j2="PENDING"))  # type: ignore[arg-type]
    assert [view.state(t) for t in sweep.trials] == [TrialState.running, TrialState.requeued, TrialState.running]
    assert next_claim(view, "d") is None
    assert Process.me().lives()
