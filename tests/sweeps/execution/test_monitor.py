"""What a watcher says, when it submits again what was lost, and what a cancel ends; a stub says what Slurm would."""

import errno
import io
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from cnnjepa.config import WarningConfig
from cnnjepa.probe_config import ProbeConfig
from cnnjepa.run import refusal
from cnnjepa.run.folder import RunResult, RunStatus
from jobs.config import compose_job
from jobs.slurm import queue as slurm
from jobs.slurm.queue import Element, SlurmError
from sweeps.cli.cancel import cancel
from sweeps.execution import monitor
from sweeps.execution.monitor import SlurmWatch, conclude
from sweeps.execution.slurm_array import SlurmEngine
from sweeps.report.status import counts_line, share_done, sweep_status, trial_status
from sweeps.spec.sweep import ScaleName, Trial
from sweeps.state import claims, submission
from sweeps.state.claims import Process, SlurmStart
from sweeps.state.folder import Sweep
from sweeps.state.history import commands, in_words
from sweeps.state.submission import Submission, job_prefix
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View
from tests.support.watched import text_of

CLUSTER = compose_job(["cluster=test_cluster"]).cluster
EMPTY = {
    "epochs": 4,
    "probes": asdict(ProbeConfig()),
    "warnings": asdict(WarningConfig()),
    "optimizer": {"lr": 0.1, "warmup_epochs": 0},
    "global_batch_size": 32,
}


class Jobs:
    """A Slurm with some elements of arrays."""

    silent = False

    def __init__(self, name: str, **states: str) -> None:
        self.listed = [Element(job.strip("j"), state, 0, "None", "gpu01", name) for job, state in states.items()]

    def named(self, prefix: str) -> list[Element]:
        return [e for e in self.listed if e.name.startswith(prefix)]

    def state(self, job: str) -> str:
        return next((e.state for e in self.listed if e.id == job), "NODE_FAIL")

    def restarts(self, job: str) -> int:
        return 0

    def in_doubt(self, arrays: object) -> set[str]:
        return set()

    def look_again(self) -> None:
        pass

    def is_elsewhere(self, cluster: str) -> bool:
        return False


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    made = Sweep(tmp_path, "x", "?", ScaleName.smoke, "o", [], {}, [Trial(i, f"s{i}", 42, EMPTY, f"trial{i}") for i in range(3)])
    made.write()
    return made


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def submitted(sweep: Sweep, number: int = 1, job: str = "7") -> Submission:
    made = Submission(sweep.path, number, f"{job_prefix(sweep)}{number:04d}", 3, 3, [], CLUSTER, "/code", Process.me(), 5.0)
    assert made.create()
    made.write_job(job)
    return made


def claim(sweep: Sweep, number: int, job: str, shared: bool = False) -> None:
    start = SlurmStart("mini", job, 0, "gpu01", 4, "/none/job.log", "/code", shared)
    assert claims.claim(sweep.trial_dir(sweep.trials[number]), 1, start.driver, 0, start)


@pytest.fixture
def watching(sweep: Sweep, console: Console, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SlurmWatch]:
    """A watch of the sweep, whose queue says so; what it submits is noted and never done."""

    def made(**states: str) -> SlurmWatch:
        jobs = Jobs(f"{job_prefix(sweep)}0001", **states)
        monkeypatch.setattr(monitor, "Queue", lambda refresh_seconds: jobs)
        found = SlurmWatch(sweep.path, console)
        monkeypatch.setattr(SlurmEngine, "submit", lambda engine, workers: [replace(submitted(sweep, 2, "8"), size=workers)])
        return found

    return made


def test_workers_are_submitted_again_when_two_looks_in_a_row_have_missed_them(
    sweep: Sweep, console: Console, watching: Callable[..., SlurmWatch]
) -> None:
    submitted(sweep)
    claim(sweep, 0, "7_0")  # whose job has ended, as those of the two others
    found = watching(j7_1="RUNNING")
    assert found.repair()
    assert said(console) == []  # it may be but a moment's view
    assert found.repair()
    assert said(console) == ["submitted again: job 8, 2 workers whose jobs had ended"]


def test_fewer_of_two_looks_are_submitted(sweep: Sweep, console: Console, watching: Callable[..., SlurmWatch]) -> None:
    submitted(sweep)
    claim(sweep, 0, "7_0")
    found = watching(j7_1="RUNNING", j7_2="RUNNING")
    assert found.repair()
    found.queue.listed.pop()  # type: ignore[attr-defined]
    assert found.repair()
    assert said(console) == ["submitted again: job 8, 1 workers whose jobs had ended"]


def test_nothing_is_submitted_while_slurm_is_silent(sweep: Sweep, console: Console, watching: Callable[..., SlurmWatch]) -> None:
    submitted(sweep)
    claim(sweep, 0, "7_0")
    found = watching()
    found.queue.silent = True
    assert [found.repair() for _ in range(3)] == [True] * 3
    assert said(console) == []


def test_jobs_that_end_before_they_begin_a_trial_are_an_error_with_their_last_words(
    sweep: Sweep, watching: Callable[..., SlurmWatch]
) -> None:
    submitted(sweep)
    found = watching()
    assert found.repair()
    with pytest.raises(SlurmError, match=r"jobs end before they start a trial: they left no log; see .*log"):
        found.repair()
    (sweep.path / "log").mkdir()
    (sweep.path / "log" / "7_0.log").write_text("python: No such file\n")
    with pytest.raises(SlurmError, match=r"jobs end before they start a trial: python: No such file; see .*log"):
        found.repair()


def test_a_job_that_found_no_trial_to_begin_is_no_error(sweep: Sweep, console: Console, watching: Callable[..., SlurmWatch]) -> None:
    """A successor that was one too many ended well; later the job of a trial was killed."""
    submitted(sweep)
    claim(sweep, 0, "7_0")
    submitted(sweep, 2, "8")
    found = watching(j7_1="RUNNING", j7_2="RUNNING")
    found.queue.listed.append(Element("8_0", "COMPLETED", 0, "None", "gpu01", f"{job_prefix(sweep)}0002"))  # type: ignore[attr-defined]
    found.engine.submit = lambda workers: [submitted(sweep, 3, "9")]  # type: ignore[method-assign, assignment, misc]
    assert [found.repair(), found.repair()] == [True, True]
    assert said(console) == ["submitted again: job 9, 3 workers whose jobs had ended"]


@pytest.mark.parametrize(("states", "vain"), [("CCCC", "...!"), ("CCF", "..!"), ("----", "...!"), ("F", "!")])
def test_jobs_that_end_in_vain_several_times_in_a_row_are_an_error(
    states: str, vain: str, sweep: Sweep, watching: Callable[..., SlurmWatch]
) -> None:
    """C: completed, F: failed, -: so long ago that Slurm lists it no more."""
    submitted(sweep)
    claim(sweep, 0, "7_0")
    found = watching(j7_1="RUNNING", j7_2="RUNNING")
    assert not found.ended_in_vain()
    for number, (state, expected) in enumerate(zip(states, vain, strict=True), start=2):
        made = submitted(sweep, number, str(number + 6))
        if state != "-":
            word = {"C": "COMPLETED", "F": "FAILED"}[state]
            name = f"{job_prefix(sweep)}{number:04d}"
            found.queue.listed.append(Element(f"{made.job}_0", word, 0, "None", "gpu01", name))  # type: ignore[attr-defined]
        assert [found.ended_in_vain(), found.ended_in_vain()] == [expected == "!"] * 2, number
    claim(sweep, 1, f"{made.job}_0")
    found.view._states.clear()
    found.reload()
    assert not SlurmWatch(sweep.path, found.console).ended_in_vain()


def test_an_element_that_a_person_cancelled_is_not_replaced(sweep: Sweep, console: Console, watching: Callable[..., SlurmWatch]) -> None:
    submitted(sweep)
    claim(sweep, 0, "7_0")
    found = watching(j7_0="RUNNING", j7_1="RUNNING", j7_2="RUNNING")
    found.queue.listed[2] = replace(found.queue.listed[2], state="CANCELLED")  # type: ignore[attr-defined]
    assert [found.repair() for _ in range(3)] == [True] * 3
    assert said(console) == []
    found.queue.listed[:] = [replace(e, state="CANCELLED") for e in found.queue.listed]  # type: ignore[attr-defined]
    found.view._states.clear()
    assert [found.repair() for _ in range(2)] == [False] * 2  # all that is left was cancelled
    assert said(console) == []


def test_a_held_job_is_said_once(sweep: Sweep, console: Console, watching: Callable[..., SlurmWatch]) -> None:
    submitted(sweep)
    found = watching(j7_0="PENDING", j7_1="PENDING")
    found.queue.listed[1] = replace(found.queue.listed[1], reason="JobHeldUser")  # type: ignore[attr-defined]
    for _ in range(3):
        found.say_why_jobs_wait()
    assert said(console) == ["job 7_1 is held (JobHeldUser); to release: scontrol release 7_1"]


@pytest.mark.parametrize(("status", "missing", "exit_status"), [("completed", {}, 0), ("completed", {"knn": "why"}, 1), ("failed", {}, 1)])
def test_a_sweep_ends_well_where_every_trial_has_all_its_values(
    sweep: Sweep, console: Console, monkeypatch: pytest.MonkeyPatch, status: str, missing: dict[str, str], exit_status: int
) -> None:
    monkeypatch.setattr(monitor.tables, "write_all", lambda view: [])
    monkeypatch.setattr(monitor, "rebuild", lambda folder: "")
    monkeypatch.setattr(monitor, "advice_lines", lambda view: [])
    for i, trial in enumerate(sweep.trials):
        cause = "too bad" if status == "failed" and i == 1 else ""
        result = RunResult(RunStatus[status] if i == 1 else RunStatus.completed, cause, {"o": 1.0}, missing if i == 1 else {})
        sweep.trial_dir(trial).mkdir(parents=True)
        sweep.run(trial).write_result(result)
    assert conclude(View(sweep), console) == exit_status
    reported = {"failed": "01-s1-seed42: failed: too bad", "completed": "01-s1-seed42: completed: knn: why"}[status]
    assert (reported in said(console)) is bool(exit_status)


def test_a_trials_status_is_its_last_numbers_and_what_its_jobs_held(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = sweep.trials[0]
    folder = sweep.trial_dir(trial)
    (folder / "claim").mkdir(parents=True)
    monkeypatch.setattr(claims.time, "time", lambda: 1000.0)
    for epoch, (job, gpus) in enumerate((("7_0", 4), ("9_0", 2)), start=1):
        assert claims.claim(folder, epoch, "d", 0, SlurmStart("mini", job, 0, f"gpu0{epoch}", gpus, "/log", "/code"))
    os.utime(folder / "claim" / "000001.json", (1900, 1900))
    os.utime(folder / "claim" / "000002.json", (2800, 2800))
    lines = [
        '{"kind": "step", "step": 1, "epoch": 1.0, "loss": 0.5, "images_per_second": 10.0}',
        '{"kind": "probe", "step": 2, "epoch": 2.0, "o": 33.0}',
        '{"kind": "step", "step": 3, "epoch": 3.0, "loss": 0.25, "images_per_second": 20.0}',
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    view = View(sweep, queue=Jobs("x", j9_0="RUNNING"))  # type: ignore[arg-type]
    found = trial_status(view, trial)
    assert {key: found[key] for key in ("state", "done", "epoch", "loss", "images_per_second", "probe", "job", "node", "restarts")} == {
        "state": "running",
        "done": 0.75,
        "epoch": 3.0,
        "loss": 0.25,
        "images_per_second": 20.0,
        "probe": 33.0,
        "job": "9_0",
        "node": "gpu02",
        "restarts": 1,
    }
    assert found["gpu_hours"] == pytest.approx(900 / 3600 * 4 + 1800 / 3600 * 2)  # 1 + 1
    assert counts_line(sweep_status(view)) == "1 running, 2 waiting of 3 trials, 2.0 GPU-hours used"
    assert share_done(trial, {"epoch": 4.5}) == 1.0
    refusal.note(folder, 1, OSError(errno.EIO, "of an earlier owner"))
    assert sweep_status(view)["trials"][0]["refused"] == ""
    refusal.note(folder, 2, OSError(errno.ENOSPC, "No space left on device"))
    assert "disk     00-s0-seed42 waits for the disk: [Errno 28] No space left on device" in text_of(view, 120)


def test_where_no_job_is_left_status_names_the_command_that_goes_on(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last job was killed outright, and Slurm does not requeue it."""
    made = submitted(sweep)
    claim(sweep, 0, "7_0")
    line = {"command": ["python", "sweeps/x.py", "--cluster", "a b"], "commit": "c", "changed": False, "time": "t"}
    (sweep.path / "commands.jsonl").write_text(json.dumps(line) + "\n")

    def status(**states: str) -> str:
        found = sweep_status(View(sweep, queue=Jobs(made.name, **states)))["to_go_on"]  # type: ignore[arg-type]
        assert isinstance(found, str)
        return found

    words = "3 trials are left, and no job of this sweep is queued or runs; to go on: python sweeps/x.py --cluster 'a b'"
    assert status(j7_0="NODE_FAIL") == status(j7_0="FAILED") == words
    again = line | {"command": ["run(x)", "--cluster", "a b"]}
    (sweep.path / "commands.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(again) + "\n")
    assert status(j7_0="FAILED").endswith("runs; to go on: run the sweep again from Python")
    assert [in_words(c["command"]) for c in commands(sweep.path)] == [
        "python sweeps/x.py --cluster 'a b'",
        "run(x) from Python, with --cluster 'a b'",
    ]
    assert status(j7_0="RUNNING") == status(j7_0="FAILED", j7_1="PENDING") == status(j7_0="PENDING") == ""
    with monkeypatch.context() as patch:
        patch.setattr(submission.time, "time", lambda: 50.0)  # 45 s after it was submitted
        assert status(j7_0="FAILED") == ""
    for trial in sweep.trials:
        sweep.trial_dir(trial).mkdir(parents=True, exist_ok=True)
        sweep.run(trial).write_result(RunResult(RunStatus.completed))
    assert status() == ""


# What a cancel ends.


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    found: list[list[str]] = []
    monkeypatch.setattr(slurm, "cancel", lambda jobs: found.append(list(jobs)))
    return found


def test_a_cancel_of_some_trials_ends_their_own_jobs_and_no_job_that_others_share(sweep: Sweep, ended: list[list[str]]) -> None:
    submitted(sweep)
    claim(sweep, 0, "7_0")
    claim(sweep, 1, "7_1", shared=True)
    jobs = Jobs(f"{job_prefix(sweep)}0001", j7_0="RUNNING", j7_1="RUNNING", j7_2="RUNNING")
    view = View(sweep, queue=jobs)  # type: ignore[arg-type]
    line = cancel(view, sweep.trials[:2])
    assert ended[0] == ["7_0"]
    assert line.startswith("2 trials cancelled, 1 jobs ended; ")
    assert [claims.is_cancelled(sweep.trial_dir(t)) for t in sweep.trials] == [True, True, False]


def test_a_cancel_of_a_sweep_ends_all_its_jobs_and_leaves_what_has_ended(sweep: Sweep, ended: list[list[str]]) -> None:
    submitted(sweep)
    claim(sweep, 0, "7_0")
    sweep.run(sweep.trials[0]).write_result(RunResult(RunStatus.completed))
    jobs = Jobs(f"{job_prefix(sweep)}0001", j7_0="COMPLETED", j7_1="RUNNING", j7_2="PENDING")
    view = View(sweep, queue=jobs)  # type: ignore[arg-type]
    assert cancel(view, []).startswith("2 trials cancelled, 2 jobs ended; ")
    assert ended == [["7_1", "7_2"]]
    assert [view.state(t) for t in sweep.trials] == [TrialState.completed, TrialState.cancelled, TrialState.cancelled]
    assert cancel(view, []).startswith("0 trials cancelled")
