"""Shares, submissions and owners in Slurm jobs; the queue is a stub where a real one cannot be brought into a state at will."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa.run.files import SEAL
from jobs.cluster import Allocation
from jobs.config import compose_job
from jobs.slurm import queue as slurm
from jobs.slurm.limits import shares
from jobs.slurm.queue import Element, Queue, SlurmError, SlurmSilentError, ask, own_job
from sweeps.execution import scheduler
from sweeps.execution.slurm_array import SlurmEngine
from sweeps.spec.sweep import ScaleName, Trial
from sweeps.state import claims
from sweeps.state.claims import Claim, Process, SlurmStart, Standing, Watch
from sweeps.state.folder import Sweep
from sweeps.state.submission import Submission, job_prefix
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View


@pytest.mark.parametrize(
    ("workers", "limit", "free"), [(33, 1001, 8), (4, 1, 2), (3, 0, 3), (2500, 1001, 8), (5, 2, 1), (5, 2, 100), (1, 1, 1), (7, 3, 2)]
)
def test_arrays_hold_all_workers_and_never_more_at_once_than_allowed(workers: int, limit: int, free: int) -> None:
    parts = shares(workers, limit, free)
    if limit <= 1:  # single jobs
        assert parts == [(1, 0)] * workers
        return
    assert sum(size for size, _ in parts) == workers
    assert all(1 <= throttle <= size <= limit for size, throttle in parts)
    side_by_side = min(len(parts), free)
    for first in range(side_by_side):  # those past the first wait for one whose share they take
        assert sum(throttle for _, throttle in parts[first : first + side_by_side]) <= free


def sweep_in(folder: Path) -> Sweep:
    return Sweep(folder, "x", "?", ScaleName.smoke, "linear.holdout_top1", [], {}, [])


def test_a_submission_is_written_once_and_read_back(tmp_path: Path) -> None:
    cluster = compose_job(["cluster=test_cluster", "sbatch.constraint=a100"]).cluster
    made = Submission(tmp_path, 1, "x-0001", 3, 2, ["12"], cluster, "/code", Process.me(), 5.0)
    assert made.create()
    assert not made.create()
    assert Submission.all_of(sweep_in(tmp_path)) == [made]
    assert (made.job, made.is_void) == ("", False)
    made.write_job("77")
    assert made.job == "77"


# A submission as version 0.1 wrote it, its profile shortened to these keys.
_BY_0_1 = """{
  "sweep_path": "/runs/x-smoke", "number": 1, "name": "x-0001", "slots": 3, "throttle": 2, "after": [], "code": "/code", "time": 5.0,
  "cluster": {
    "name": "test_cluster", "scheduler": "slurm", "device": "cpu",
    "nodes_per_slot": 1, "ranks_per_slot": 4, "cores_per_slot": 8, "gpus_per_slot": 2.0, "memory_gb_per_slot": 16.0
  },
  "writer": {"host": "gpu01", "boot": "b", "namespace": "n", "pid": 1, "started": 2.0},
  "allocation": {"nodes": 2, "slots_per_node": 4}
}"""


def test_a_submission_file_keeps_the_keys_of_version_0_1(tmp_path: Path) -> None:
    path = tmp_path / "submissions" / "000001.json"
    path.parent.mkdir()
    path.write_text(_BY_0_1)
    cluster, allocation = Submission.load(path).cluster, Submission.load(path).allocation
    assert (Submission.load(path).size, allocation) == (3, Allocation(2, 4))
    assert (cluster.nodes_per_trial, cluster.ranks_per_trial, cluster.cores_per_trial) == (1, 4, 8)
    assert (cluster.gpus_per_trial, cluster.memory_gb_per_trial) == (2.0, 16.0)
    written = replace(Submission.load(path), sweep_path=tmp_path, number=2)
    assert written.create()
    kept, before = json.loads(written.path.read_text()), json.loads(_BY_0_1)
    assert kept.keys() - {SEAL} == before.keys()
    assert (kept["slots"], kept["allocation"]) == (3, before["allocation"])
    assert {key: kept["cluster"][key] for key in before["cluster"]} == before["cluster"]
    assert not [key for key in kept["cluster"] if key.endswith("_per_trial")]


def test_no_two_folders_share_the_names_of_their_jobs(tmp_path: Path) -> None:
    first, second = (job_prefix(sweep_in(tmp_path / part / "sweep")) for part in ("a", "b"))
    assert not first.startswith(second)
    assert not second.startswith(first)


class StubQueue:
    """One job in one state."""

    silent = False

    def __init__(self, state: str, restarts: int = 0) -> None:
        self._state, self._restarts = state, restarts

    def state(self, job: str) -> str:
        return self._state

    def restarts(self, job: str) -> int:
        return self._restarts

    def is_elsewhere(self, cluster: str) -> bool:
        return cluster == "far"


START = SlurmStart("mini", "7_3", 0, "gpu01", 4, "/log", "/code")


@pytest.fixture
def claimed(tmp_path: Path) -> Claim:
    elsewhere = Process("gpu01", "boot", "", 1, 0.0)
    owned = claims.claim(tmp_path, 1, START.driver, 0, START)
    assert owned is not None
    return Claim(1, elsewhere, START.driver, 0, owned.claim.time, START)


def standing(folder: Path, claim: Claim, state: str, restarts: int = 0) -> Standing:
    return Watch(queue=StubQueue(state, restarts)).standing(folder, claim)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "restarts", "expected"),
    [
        ("RUNNING", 0, Standing.alive),
        ("RUNNING", 1, Standing.requeued),  # the next start has not claimed yet
        ("PENDING", 1, Standing.requeued),
        ("COMPLETING", 0, Standing.requeued),
        ("", 0, Standing.alive),  # Slurm does not answer
        (slurm.GONE, 0, Standing.alive),  # absent from one answer, or another user's: its heartbeat goes on
        *((state, 0, Standing.alive) for state in ("SUSPENDED", "STOPPED")),
        *((state, 1, Standing.requeued) for state in ("REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING")),
        *((state, 0, Standing.dead) for state in ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")),
        *((state, 0, Standing.dead) for state in ("BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED")),
    ],
)
def test_an_owner_is_what_slurm_says_of_its_job(tmp_path: Path, claimed: Claim, state: str, restarts: int, expected: Standing) -> None:
    assert standing(tmp_path, claimed, state, restarts) is expected


SHARED = replace(START, shared=True, gpus=0.5)


def share(claim: Claim, **changes: object) -> Claim:
    return replace(claim, slurm=replace(SHARED, **changes))


@pytest.mark.parametrize(
    ("state", "restarts", "released", "expected"),
    [
        ("RUNNING", 0, False, Standing.alive),
        ("RUNNING", 0, True, Standing.dead),  # it goes on with other workers: this trial is for any worker to take up
        ("RUNNING", 1, False, Standing.requeued),
        ("RUNNING", 1, True, Standing.requeued),
        ("PENDING", 1, True, Standing.requeued),
        ("COMPLETING", 0, True, Standing.requeued),
        ("", 0, False, Standing.alive),
        ("", 0, True, Standing.requeued),
        ("COMPLETED", 0, True, Standing.dead),
        ("CANCELLED", 0, True, Standing.cancelled),
    ],
)
def test_an_owner_in_a_job_of_many_workers_is_judged_by_itself_while_the_job_runs(
    tmp_path: Path, claimed: Claim, state: str, restarts: int, released: bool, expected: Standing
) -> None:
    if released:
        (tmp_path / "claim" / "000001.released").touch()
    assert standing(tmp_path, share(claimed), state, restarts) is expected


def test_a_worker_that_fell_silent_in_a_running_allocation_is_dead_on_our_own_clock(tmp_path: Path, claimed: Claim) -> None:
    watch = Watch(queue=StubQueue("RUNNING"), silence_seconds=0.2)  # type: ignore[arg-type]
    assert watch.standing(tmp_path, share(claimed)) is Standing.alive
    time.sleep(0.3)
    assert watch.standing(tmp_path, share(claimed)) is Standing.dead
    assert watch.standing(tmp_path, claimed) is Standing.alive  # one worker a job: Slurm's word is enough


def test_workers_of_one_allocation_let_each_other_live(tmp_path: Path, claimed: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"SLURM_CLUSTER_NAME": "mini", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "10"}.items():
        monkeypatch.setenv(key, value)
    beside = share(claimed)
    assert standing(tmp_path, beside, "RUNNING") is Standing.alive  # on another node
    assert standing(tmp_path, share(claimed, restart=1), "RUNNING") is Standing.dead
    here = Process.me()
    assert standing(tmp_path, replace(beside, owner=here), "RUNNING") is Standing.alive
    assert standing(tmp_path, replace(beside, owner=replace(here, started=here.started - 100)), "RUNNING") is Standing.dead
    watch = Watch(queue=StubQueue("RUNNING"))  # type: ignore[arg-type]
    watch.mark_dead(tmp_path, beside)  # the driver has seen all workers of its round end
    assert watch.standing(tmp_path, beside) is Standing.dead
    assert Watch(watch.silent).standing(tmp_path, beside) is Standing.dead
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert standing(tmp_path, beside, "RUNNING") is Standing.dead
    (tmp_path / "claim" / "000001.released").touch()
    assert standing(tmp_path, share(claimed, restart=1), "RUNNING") is Standing.dead


def test_a_share_of_a_gpu_is_counted(tmp_path: Path) -> None:
    environment = {"SLURM_CLUSTER_NAME": "mini", "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "gpu02", "SLURM_JOB_NODELIST": "gpu[01-03]"}
    mine = SlurmStart.me(0.25, "/log", "/code", environment, shared=True)
    assert mine == SlurmStart("mini", "7", 0, "gpu02", 0.25, "/log", "/code", True)
    assert claims.claim(tmp_path, 1, "d", 0, mine)
    assert claims.history(tmp_path)[0].slurm == mine


def element(name: str, number: str, state: str) -> Element:
    return Element(number, state, 0, "", "", name)


class Listed:
    """A queue that lists some elements."""

    silent = False

    def __init__(self, *elements: Element) -> None:
        self.elements = elements

    def named(self, prefix: str) -> list[Element]:
        return [e for e in self.elements if e.name.startswith(prefix)]

    def state(self, job: str) -> str:
        return next((e.state for e in self.elements if e.id == job), "COMPLETED")

    def restarts(self, job: str) -> int:
        return 0

    def in_doubt(self, arrays: object) -> set[str]:
        return set()

    def is_elsewhere(self, cluster: str) -> bool:
        return False


def test_one_allocation_is_asked_for_and_serves_all_that_is_left(tmp_path: Path) -> None:
    trials = [Trial(i, f"s{i}", 42, {}, f"{i}") for i in range(5)]
    sweep = replace(sweep_in(tmp_path), trials=trials)
    cluster = compose_job(["cluster=test_cluster"]).cluster
    allocation = Allocation.of(cluster, 1, None)
    array = Submission(tmp_path, 1, f"{job_prefix(sweep)}0001", 5, 1, [], cluster, "/code", Process.me(), 5.0)
    shared = replace(array, number=2, name=f"{job_prefix(sweep)}0002", size=1, allocation=allocation)
    assert array.create()

    def missing(*elements: Element, of: Allocation | None) -> int:
        queue = Listed(*elements)
        return SlurmEngine(sweep, cluster, Path("/code"), queue, of).missing(View(sweep, queue=queue))  # type: ignore[arg-type]

    waiting = [element(array.name, f"1_{i}", "PENDING") for i in range(5)]
    running = [element(array.name, f"1_{i}", "RUNNING") for i in range(5)]
    assert missing(of=allocation) == 1
    assert missing(*waiting, of=allocation) == 1  # who asks for an allocation does not want to wait for the array
    assert missing(*running, of=allocation) == 0  # each trial runs
    assert shared.create()
    assert Submission.all_of(sweep)[1] == shared
    engine = SlurmEngine.of(sweep, Listed(element(shared.name, "2_0", "RUNNING")))  # type: ignore[arg-type]
    assert engine is not None
    assert engine.allocation == engine.allocated == allocation
    for state in ("PENDING", "RUNNING"):
        assert missing(element(shared.name, "2_0", state), of=allocation) == 0
        assert missing(element(shared.name, "2_0", state), of=None) == 1  # of 5 trials 4 have a worker in it
    assert missing(element(shared.name, "2_0", "COMPLETED"), of=allocation) == 1
    gone = SlurmEngine(sweep, cluster, Path("/code"), Listed(element(shared.name, "2_0", "CANCELLED")), allocation)  # type: ignore[arg-type]
    assert gone.cancelled_unclaimed(View(sweep, queue=gone.queue)) == {"2_0"}  # and is not asked for again by itself


def test_a_trial_that_another_worker_takes_up_meanwhile_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a look at its state and one at its claims."""
    trial = Trial(0, "s", 42, {}, "abc")
    sweep = replace(sweep_in(tmp_path), trials=[trial])
    folder, others = sweep.trial_dir(trial), []
    first = claims.claim(folder, 1, "d", 0)
    assert first is not None
    with first:
        pass
    view = View(sweep)
    looked = view.state

    def state(trial: Trial) -> TrialState:
        found = looked(trial)
        if not others:
            others.append(claims.claim(folder, 2, "d", 0))
        return found

    monkeypatch.setattr(view, "state", state)
    monkeypatch.setattr(scheduler, "runnable", lambda _: True)
    assert scheduler.next_claim(view, "d") is None
    assert others[0] is not None
    assert [c.attempt for c in claims.history(folder)] == [1, 2]


def test_a_job_that_slurm_forgot_is_dead_when_its_heartbeat_stands_still(tmp_path: Path, claimed: Claim) -> None:
    os.utime(tmp_path / "claim" / "000001.json", (time.time() - 200, time.time() - 200))
    assert standing(tmp_path, claimed, slurm.GONE) is Standing.dead
    assert standing(tmp_path, claimed, "") is Standing.alive


def test_before_the_second_look_a_sign_of_life_counts_and_what_has_saved_may_start_again(tmp_path: Path, claimed: Claim) -> None:
    assert standing(tmp_path, claimed, slurm.UNLISTED) is Standing.alive
    released = tmp_path / "claim" / "000001.released"
    released.touch()
    assert standing(tmp_path, claimed, slurm.UNLISTED) is Standing.requeued
    assert standing(tmp_path, claimed, slurm.GONE) is Standing.dead
    for path in (released, tmp_path / "claim" / "000001.json"):
        os.utime(path, (time.time() - 200, time.time() - 200))
    assert standing(tmp_path, claimed, slurm.UNLISTED) is Standing.dead


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETED", "PENDING", slurm.GONE, ""])
def test_a_job_of_another_cluster_is_judged_by_its_heartbeat_and_nothing_is_written(tmp_path: Path, claimed: Claim, state: str) -> None:
    """Its number means another job here."""
    far, before = replace(claimed, slurm=replace(START, cluster="far")), claims.listing(tmp_path)
    assert standing(tmp_path, far, state) is Standing.alive
    assert claims.listing(tmp_path) == before
    (tmp_path / "claim" / "000001.released").touch()
    assert standing(tmp_path, far, state) is Standing.dead


def test_a_cancelled_job_is_remembered_until_the_trial_is_taken_up(tmp_path: Path, claimed: Claim) -> None:
    assert standing(tmp_path, claimed, "CANCELLED") is Standing.cancelled
    assert standing(tmp_path, claimed, slurm.GONE) is Standing.cancelled  # Slurm forgets in minutes
    claims.uncancel(tmp_path)
    assert standing(tmp_path, claimed, "CANCELLED") is Standing.dead
    claims.cancel(tmp_path)
    assert standing(tmp_path, claimed, slurm.GONE) is Standing.cancelled


def test_a_job_takes_up_what_its_earlier_start_left(tmp_path: Path, claimed: Claim, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"SLURM_CLUSTER_NAME": "mini", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "10"}.items():
        monkeypatch.setenv(key, value)
    assert own_job() == "7_3"
    assert standing(tmp_path, claimed, "RUNNING") is Standing.dead
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert standing(tmp_path, claimed, "RUNNING") is Standing.alive


def test_starts_in_vain_are_those_of_slurm_jobs_that_gained_no_step(tmp_path: Path) -> None:
    def past(*steps: int, start: SlurmStart | None = START) -> list[Claim]:
        return [Claim(i, Process.me(), "d", step, 0.0, start) for i, step in enumerate(steps)]

    assert claims.starts_in_vain(past(0, 5, 5, 5), 5, tmp_path) == 3
    assert claims.starts_in_vain(past(5, 5), 6, tmp_path) == 0
    assert claims.starts_in_vain(past(5, 5, start=None), 5, tmp_path) == 0
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim" / "000001.resumed").touch()  # asked for again after it: what was before is forgiven
    assert claims.starts_in_vain(past(5, 5, 5, 5), 5, tmp_path) == 2


def stand_in(folder: Path, name: str, script: str) -> None:
    """A stand-in for one of Slurm's commands."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_refusal_is_said_at_once_and_silence_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    stand_in(tmp_path, "scancel", "echo 'scancel: error: Invalid job id 5' >&2; exit 1")
    with pytest.raises(SlurmError, match="Invalid job id 5") as refused:
        ask(["scancel", "5"], 100)
    assert not isinstance(refused.value, SlurmSilentError)
    stand_in(tmp_path, "squeue", "echo x >> $(dirname $0)/tries; echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1")
    with pytest.raises(SlurmSilentError, match="Unable to contact slurm controller"):
        ask(["squeue"], 3.5)
    assert len((tmp_path / "tries").read_text().split()) == 3  # after 1 and 2 seconds


def test_while_slurm_is_silent_its_last_word_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    queue = Queue(refresh_seconds=0, patience_seconds=0)
    stand_in(tmp_path, "sacct", "exit 1")
    stand_in(tmp_path, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert queue.state("7_3") == ""
    stand_in(tmp_path, "squeue", "echo '7_3|RUNNING|1|None|gpu01|x-0001|'")
    assert (queue.state("7_3"), queue.restarts("7_3"), queue.state("8_1")) == ("RUNNING", 1, "")  # sacct fails: nothing is known of 8_1
    stand_in(tmp_path, "squeue", "echo 'something unheard of' >&2; exit 1")
    assert queue.state("7_3") == "RUNNING"
    assert queue.silent
    stand_in(tmp_path, "squeue", "echo '||||'; true")
    assert queue.state("7_3") == "RUNNING"  # an empty answer is not the end of a job
    assert queue.state("8_1") == ""
    stand_in(tmp_path, "sacct", "true")
    assert queue.state("8_1") == slurm.UNLISTED
    stand_in(tmp_path, "sacct", "echo '8_1|CANCELLED by 0|x'")
    assert queue.state("8_1") == "CANCELLED"


def test_a_trial_cancelled_while_it_is_claimed_stays_cancelled(tmp_path: Path) -> None:
    claims.cancel(tmp_path)  # before anybody has it
    owned = claims.claim(tmp_path, 1, "d", 0)
    assert owned is not None
    assert owned.lost()
    assert claims.is_cancelled(tmp_path)
    claims.uncancel(tmp_path)
    assert not claims.is_cancelled(tmp_path)
    assert not owned.lost()
    claims.cancel(tmp_path)
    assert owned.lost()
