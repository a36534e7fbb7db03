"""One array is submitted exactly once, whatever sbatch and squeue answer; both are played here, and time is the test's."""

import contextlib
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.config import compose_job
from jobs.slurm import queue as slurm
from jobs.slurm.queue import Queue, SlurmError, SlurmSilentError
from jobs.slurm.sbatch import render
from jobs.slurm.supervisor import AGAIN
from sweeps.execution import slurm_array, submitting, successor
from sweeps.execution.slurm_array import SlurmEngine
from sweeps.execution.submitting import QueueFullError
from sweeps.spec.sweep import ScaleName, Trial
from sweeps.state import claims
from sweeps.state.claims import SlurmStart
from sweeps.state.folder import Sweep
from sweeps.state.submission import Submission
from sweeps.state.view import View
from tests.support.sample import seeded

CLUSTER = compose_job(["cluster=test_cluster", "max_parallel=0"]).cluster
AWAY = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
LOST = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
TOO_MANY = "sbatch: error: AssocMaxSubmitJobLimit sbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
WRONG = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified"
FOREIGN = "sbatch: erreur : le contrôleur ne répond pas"
COLUMNS = "JOBID|STATE|RESTARTS|REASON|NODELIST|NAME|SUBMIT_TIME|START_TIME|\n"


class Site:
    """A Slurm with some jobs; `sbatch` says what each call answers: "" takes the job, LOST takes it and fails, other words fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls, self.sbatch = 1000.0, [], []  # type: ignore[var-annotated]
        self.jobs: dict[str, tuple[str, int, str]] = {}  # number -> name, size, state
        self.empty, self.limit, self.silent = (0.0, 0.0), 0, False
        for module in (slurm, submitting, slurm_array):
            monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(submitting.time, "sleep", self.sleep)
        monkeypatch.setattr(submitting, "submit", self.submit)
        monkeypatch.setattr(slurm, "ask", self.ask)
        monkeypatch.setattr(slurm_array, "submit_limit", lambda cluster: None)
        monkeypatch.setattr(slurm_array, "array_limit", lambda: 1001)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def submit(self, profile: object, array: object) -> str:
        said = self.sbatch.pop(0) if self.sbatch else ""
        size = array.size  # type: ignore[attr-defined]
        self.calls.append(size)
        if not said and self.limit and sum(n for _, n, _ in self.jobs.values()) + size > self.limit:
            said = TOO_MANY
        number = str(100 + len(self.jobs))
        if said in ("", LOST):
            self.jobs[number] = array.name, size, "PENDING"  # type: ignore[attr-defined]
        if said:
            raise SlurmError(f"sbatch: {said}")
        return number

    def ask(self, command: list[str], patience_seconds: float = 0.0) -> str:
        if self.silent:
            raise SlurmSilentError("no answer")
        if command[0] != "squeue" or self.empty[0] <= self.now < self.empty[1]:
            return ""
        rows = [f"{n}_{i}|{state}|0|None||{name}|N/A|N/A|\n" for n, (name, size, state) in self.jobs.items() for i in range(size)]
        return COLUMNS + "".join(rows)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(monkeypatch)


@pytest.fixture
def engine(tmp_path: Path, site: Site) -> SlurmEngine:
    trials = [Trial(i, f"s{i}", 42, {}, f"trial{i}") for i in range(40)]
    sweep = Sweep(tmp_path, "x", "?", ScaleName.smoke, "o", [], {}, trials)
    sweep.write()
    return SlurmEngine(sweep, CLUSTER, Path("/code"), Queue(refresh_seconds=0))


def submitted(engine: SlurmEngine, workers: int) -> list[int]:
    engine.missing(View(engine.sweep, queue=engine.queue))
    return [made.size for made in engine.submit(workers)]


@pytest.mark.parametrize("away", [1, 4, 9])
def test_an_absent_controller_is_waited_for(away: int, engine: SlurmEngine, site: Site) -> None:
    site.sbatch = [AWAY] * away
    assert submitted(engine, 40) == [40]
    assert len(site.jobs) == 1
    assert [s.job for s in Submission.all_of(engine.sweep)] == ["100"]


def test_it_is_waited_for_only_so_long_and_then_its_own_words_are_repeated(engine: SlurmEngine, site: Site) -> None:
    site.sbatch = [AWAY] * 1000
    with pytest.raises(SlurmError, match=r"Unable to contact slurm controller \(connect failure\)"):
        submitted(engine, 40)
    assert site.now < 1000 + 400
    assert [s.is_void for s in Submission.all_of(engine.sweep)] == [True]


@pytest.mark.parametrize("empty", [0.0, 15.0, 50.0])
def test_a_lost_answer_is_no_second_array_even_if_squeue_then_lists_nothing(empty: float, engine: SlurmEngine, site: Site) -> None:
    site.sbatch, site.empty = [LOST], (1000.0, 1000.0 + empty)
    assert submitted(engine, 40) == [40]
    assert site.calls == [40]
    assert [s.job for s in Submission.all_of(engine.sweep)] == ["100"]


def test_what_lasts_is_said_at_once_and_what_nobody_knows_after_three_tries(engine: SlurmEngine, site: Site) -> None:
    site.sbatch = [WRONG]
    with pytest.raises(SlurmError, match="Invalid account") as refused:
        submitted(engine, 40)
    assert not isinstance(refused.value, QueueFullError)
    assert (len(site.calls), site.now) == (1, 1000.0)
    site.sbatch = [FOREIGN, FOREIGN]
    assert submitted(engine, 40) == [40]
    site.sbatch, site.calls = [FOREIGN] * 9, []
    with pytest.raises(SlurmError, match="le contrôleur"):
        submitted(engine, 2)
    assert len(site.calls) == 3


def test_while_squeue_is_away_too_the_submission_stays_open_for_the_next_command(engine: SlurmEngine, site: Site) -> None:
    site.sbatch = [LOST]
    engine.missing(View(engine.sweep, queue=engine.queue))
    site.silent = True
    with pytest.raises(SlurmSilentError, match="run the command again to settle it"):
        engine.submit(3)
    site.silent = False
    (left,) = Submission.all_of(engine.sweep)
    assert (left.job, left.is_void) == ("", False)
    assert engine.unsettled(print) == ""
    assert Submission.all_of(engine.sweep)[0].job == "100"


def test_a_submission_is_void_only_when_its_name_is_missing_at_a_second_look(
    engine: SlurmEngine, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_array, "_DEAD_WRITER_SECONDS", 0.0)
    monkeypatch.setattr(slurm_array, "_sbatch_lives", lambda submission: False)
    monkeypatch.setattr(claims.Process, "lives", lambda self: False)
    first = engine.planned(3, 3, [])
    assert first.create()
    site.jobs["100"] = first.name, 3, "PENDING"  # its submitter died before recording it
    site.empty = (1000.0, 1020.0)
    assert engine.unsettled(print).startswith("waiting for a submission")
    site.now += 19
    assert engine.unsettled(print).startswith("waiting for a submission")
    site.now += 2
    assert engine.unsettled(print) == ""
    assert (first.job, first.is_void) == ("100", False)
    engine._seen = 1
    second = engine.planned(2, 2, [])
    assert second.create()
    assert engine.unsettled(print).startswith("waiting for a submission")
    site.now += 10
    assert engine.unsettled(print) == ""
    assert second.is_void


@pytest.mark.parametrize("outage", [15.0, 45.0])
def test_while_squeue_answers_with_nothing_no_worker_is_missing(outage: float, engine: SlurmEngine, site: Site) -> None:
    """Also for a command that has just been started and remembers nothing."""
    assert submitted(engine, 40) == [40]
    site.empty = (site.now, site.now + outage)
    while site.now < site.empty[1]:
        for looking in (engine, SlurmEngine(engine.sweep, CLUSTER, Path("/code"), Queue(refresh_seconds=0))):
            missing = looking.missing(View(engine.sweep, queue=looking.queue))
            assert missing <= 0 or not looking.is_settled()
            if missing > 0:
                with pytest.raises(slurm_array.RacedError):
                    looking.submit(missing)
        site.now += 10
    assert engine.missing(View(engine.sweep, queue=engine.queue)) == 0
    assert site.calls == [40]


def test_a_trial_with_a_fresh_heartbeat_needs_no_worker_although_its_job_is_not_listed(engine: SlurmEngine, site: Site) -> None:
    for number in (0, 1):
        start = SlurmStart("mini", f"55_{number}", 0, "gpu01", 4, "/log", "/code")
        assert claims.claim(engine.sweep.trial_dir(engine.sweep.trials[number]), 1, start.driver, 0, start)
    view = View(engine.sweep, queue=engine.queue)
    assert engine.missing(view) == 38
    site.now += 10_000
    assert engine.missing(View(engine.sweep, queue=engine.queue)) == 38
    beat = engine.sweep.trial_dir(engine.sweep.trials[0]) / "claim" / "000001.json"
    old = time.time() - 1000
    os.utime(beat, (old, old))
    assert engine.missing(View(engine.sweep, queue=engine.queue)) == 39


# Limits on queued jobs.


def test_what_fits_is_submitted_and_one_job_left_over_for_a_successor(
    engine: SlurmEngine, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_array, "submit_limit", lambda cluster: 10)
    site.jobs["7"] = "another", 2, "RUNNING"
    site.jobs["8"] = "another", 5, "COMPLETED"
    assert submitted(engine, 40) == [7]
    assert "at most 10" in engine.refused
    assert submitted(engine, 1) == [1]
    assert engine.refused == ""
    with pytest.raises(QueueFullError, match="at most 10"):
        submitted(engine, 33)
    assert site.calls == [7, 1]


@pytest.mark.parametrize(("limit", "sizes"), [(4, [2, 2]), (25, [20, 5]), (1, [1]), (40, [40])])
def test_a_limit_that_slurm_does_not_show_is_met_by_halving(limit: int, sizes: list[int], engine: SlurmEngine, site: Site) -> None:
    site.limit = limit
    assert submitted(engine, 40) == sizes
    assert sum(n for _, n, _ in site.jobs.values()) == limit
    assert ("AssocMaxSubmitJobLimit" in engine.refused) is (limit < 40)
    assert len({s.name for s in Submission.all_of(engine.sweep)}) == len(Submission.all_of(engine.sweep))
    assert any(s.was_full for s in Submission.all_of(engine.sweep)) is (limit < 40)


def test_a_refusal_half_way_keeps_what_was_submitted_and_sbatchs_own_words(
    engine: SlurmEngine, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_array, "array_limit", lambda: 20)
    site.sbatch = ["", WRONG]
    assert submitted(engine, 40) == [20]
    assert engine.refused.endswith("Invalid account or account/partition combination specified")


@pytest.mark.parametrize("limit", [0, 1])
def test_without_arrays_each_worker_is_a_job_of_its_own_and_no_more_run_at_once_than_may(
    limit: int, engine: SlurmEngine, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_array, "array_limit", lambda: limit)
    engine.cluster = replace(engine.cluster, max_parallel=2)
    assert submitted(engine, 5) == [1] * 5
    made = Submission.all_of(engine.sweep)
    assert [s.throttle for s in made] == [0] * 5
    assert [s.after for s in made] == [[], [], ["100"], ["101"], ["102"]]
    script = render(made[0].job_profile, made[0].array())
    assert "--array" not in script
    assert f"--output={made[0].log_folder}/%j.log" in script


# What a job does with what it leaves.


def test_a_job_that_ends_submits_the_rest_as_far_as_it_fits_and_else_goes_on_itself(
    engine: SlurmEngine, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_array, "submit_limit", lambda cluster: 4)
    site.jobs["7"] = f"{engine.prefix}0001", 3, "RUNNING"
    engine.leaving = "7_0"
    assert successor.submit_rest(engine, stopped=False) == 0
    assert site.calls == [1]
    assert successor.submit_rest(engine, stopped=False) == AGAIN
    assert site.calls == [1]


def test_the_successor_of_a_job_that_was_stopped_waits_for_room(engine: SlurmEngine, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_array, "submit_limit", lambda cluster: 3)
    site.jobs["7"] = f"{engine.prefix}0001", 3, "RUNNING"
    engine.leaving, slept = "7_0", site.sleep

    def sleep(seconds: float) -> None:
        slept(seconds)
        if site.now > 1010:
            site.jobs["7"] = f"{engine.prefix}0001", 2, "RUNNING"

    monkeypatch.setattr(submitting.time, "sleep", sleep)
    assert successor.submit_rest(engine, stopped=True) == 0
    assert site.calls == [1]
    assert site.now < 1030


def test_it_does_not_wait_for_ever_and_never_submits_for_what_others_run(
    engine: SlurmEngine, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_array, "submit_limit", lambda cluster: 3)
    site.jobs["7"] = f"{engine.prefix}0001", 3, "RUNNING"
    engine.leaving = "7_0"
    assert successor.submit_rest(engine, stopped=True) == 0
    assert (site.calls, site.now < 1060) == ([], True)
    site.jobs["8"] = f"{engine.prefix}0002", 38, "PENDING"
    assert successor.submit_rest(engine, stopped=False) == 0
    assert site.calls == []


def test_what_a_person_cancelled_is_submitted_again_by_a_command_alone(engine: SlurmEngine, site: Site) -> None:
    submitted(engine, 40)
    (made,) = Submission.all_of(engine.sweep)
    site.jobs["100"] = made.name, 40, "CANCELLED"
    start = SlurmStart("", "100_5", 0, "gpu01", 4, "/log", "/code", name=made.name)
    assert claims.claim(engine.sweep.trial_dir(engine.sweep.trials[5]), 1, start.driver, 0, start)
    engine.leaving = "100_5"
    assert successor.submit_rest(engine, stopped=False) == 0
    site.now += 1000
    site.jobs["100"] = made.name, 0, ""  # Slurm has forgotten them
    engine.queue.look_again()
    assert engine.given_up(View(engine.sweep, queue=engine.queue)) == 39
    later = time.time() + 100
    os.utime(engine.sweep.path / "sweep.json", (later, later))  # a command has run since
    assert engine.given_up(View(engine.sweep, queue=engine.queue)) == 0


def test_where_a_limit_was_met_before_a_job_tries_one_more(engine: SlurmEngine, site: Site) -> None:
    site.limit = 4
    submitted(engine, 40)
    site.calls.clear()
    engine.leaving = "100_0"
    assert successor.submit_rest(engine, stopped=False) == AGAIN
    assert site.calls == [1]


# Bad answers of every kind, drawn by a seed.


@seeded
def test_of_many_calls_a_third_goes_wrong_and_each_worker_is_queued_once(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch, seed: str
) -> None:
    monkeypatch.setattr(submitting.time, "time", lambda: site.now + 1.8e9)
    ask, draw, calls = site.ask, random.Random(seed), 0

    def badly(command: list[str], patience_seconds: float = 0.0) -> str:
        nonlocal calls
        calls += 1
        kind = draw.choice(["silent", "late", "empty", "banner"]) if draw.random() < 0.3 else ""
        if kind == "silent":
            raise SlurmSilentError("no answer")
        site.now += 4 * (kind == "late")
        return "" if kind == "empty" else f"  Welcome | to\n{ask(command)}" if kind == "banner" else ask(command)

    monkeypatch.setattr(slurm, "ask", badly)
    for number in range(12):
        trials = [Trial(i, f"s{i}", 42, {}, f"trial{i}") for i in range(7)]
        sweep = Sweep(tmp_path / str(number), "x", "?", ScaleName.smoke, "o", [], {}, trials)
        site.jobs.clear()
        site.sbatch = [draw.choice([AWAY, LOST, FOREIGN, ""]) if draw.random() < 0.5 else "" for _ in range(9)]
        for _command in range(8):  # some of them give up; the next one goes on
            looking = SlurmEngine(sweep, CLUSTER, Path("/code"), Queue(refresh_seconds=0))
            with contextlib.suppress(SlurmError, slurm_array.RacedError):
                looking.settle(lambda text: None)
                if (missing := looking.missing(View(sweep, queue=looking.queue))) > 0:
                    looking.submit(missing)
        assert [n for _, n, _ in site.jobs.values()] == [7], f"sweep {number} after {calls} calls"
    assert calls > 200
