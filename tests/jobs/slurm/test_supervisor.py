"""What a job's supervisor does when its command ends, with Slurm and the clock in our hands; with a real Slurm in test_slurm_faults.py."""

import datetime
import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from jobs.cli import INTERRUPTED, STOPPED
from jobs.slurm import supervisor
from jobs.slurm.queue import SlurmError, SlurmSilentError
from jobs.slurm.supervisor import Supervisor, requeue, seconds_left


class Night:
    """A clock that only sleeping moves, and the things that were done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.done = 0.0, []  # type: ignore[var-annotated]
        self.requeues, self.preempted, self.left = True, False, 10_000.0
        self.handed, self.again = [], []  # type: ignore[var-annotated]
        monkeypatch.setattr(supervisor.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(supervisor.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def night(monkeypatch: pytest.MonkeyPatch) -> Night:
    return Night(monkeypatch)


Attempts = Callable[..., Supervisor]


@pytest.fixture
def watched(night: Night, monkeypatch: pytest.MonkeyPatch) -> Attempts:
    """A supervisor whose command ends so, each time after so many seconds, in a job that Slurm calls `state`."""

    def made(*attempts: tuple[int | None, float], state: str = "RUNNING") -> Supervisor:
        found, left = Supervisor(["true"], "7_3", 30.0), list(attempts)

        def attempt() -> int | None:
            status, seconds = left.pop(0)
            night.now += seconds
            return status

        monkeypatch.setattr(found, "attempt", attempt)
        monkeypatch.setattr(supervisor, "job_state", lambda job: state)
        monkeypatch.setattr(supervisor, "requeue", lambda job: night.done.append(job) or night.requeues)
        monkeypatch.setattr(supervisor, "is_cancelled_by_preemption", lambda job: night.preempted)
        monkeypatch.setattr(supervisor, "seconds_left", lambda job: night.left)
        monkeypatch.setattr(found, "call_successor", lambda *why: night.handed.append(why[0]) or bool(night.again and night.again.pop(0)))
        return found

    return made


def test_what_is_done_is_done(watched: Attempts, night: Night) -> None:
    assert watched((0, 5.0), state="COMPLETING").run() == 0
    assert night.done == []


@pytest.mark.parametrize(("status", "requeued"), [(STOPPED, ["7_3"]), (None, ["7_3"])])
def test_a_run_that_stopped_and_one_that_did_not_stop_in_time_go_on_in_another_start(
    watched: Attempts, night: Night, status: int | None, requeued: list[str]
) -> None:
    assert watched((status, 5.0)).run() == INTERRUPTED
    assert night.done == requeued


def test_ranks_that_die_of_the_signal_to_stop_are_requeued_and_not_started_again(watched: Attempts, night: Night) -> None:
    found = watched((143, 5.0))
    found.note(signal.SIGTERM, None)
    assert found.run() == INTERRUPTED
    assert night.done == ["7_3"]


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", "TIMEOUT", ""])
@pytest.mark.parametrize("status", [1, STOPPED, None])
def test_a_job_that_slurm_has_ended_or_requeued_is_slurms(watched: Attempts, night: Night, state: str, status: int | None) -> None:
    assert watched((status, 5.0), state=state).run() == INTERRUPTED
    assert night.done == []


def test_a_death_is_started_again_in_place_and_four_quick_ones_in_a_row_are_given_up(watched: Attempts, night: Night) -> None:
    assert watched((1, 5.0), (0, 5.0)).run() == 0
    assert watched(*[(137, 599.0)] * 4).run() == 137
    assert watched(*[(1, 5.0)] * 3, (1, 600.0), *[(1, 5.0)] * 2, (9, 5.0)).run() == 9  # the slow one is the first of another row
    assert watched(*[(1, 700.0)] * 9, (0, 1.0)).run() == 0
    assert night.done == []


def test_where_slurm_does_not_requeue_the_job_ends_at_once_and_a_successor_goes_on(watched: Attempts, night: Night) -> None:
    night.requeues = False
    assert watched((STOPPED, 5.0)).run() == INTERRUPTED
    assert watched((None, 7.0)).run() == INTERRUPTED
    assert night.handed == ["--stopped", "--stopped"]
    assert night.now == 12.0


@pytest.mark.parametrize(("preempted", "handed"), [(True, ["--stopped"]), (False, [])])
def test_a_job_that_a_preemption_cancels_has_a_successor_and_one_that_a_person_cancels_none(
    watched: Attempts, night: Night, preempted: bool, handed: list[str]
) -> None:
    night.preempted = preempted
    found = watched((STOPPED, 5.0), state="COMPLETING")
    found.successor = ["m", "a"]
    assert found.run() == INTERRUPTED
    assert night.handed == handed
    assert night.done == []


def test_what_is_left_and_cannot_be_queued_is_run_in_the_same_job_while_it_has_time(watched: Attempts, night: Night) -> None:
    night.again = [True, True, False]
    assert watched((0, 5.0), (0, 5.0), (0, 5.0)).run() == 0
    assert night.handed == ["--ended-since"] * 3
    night.again, night.left = [True], 200.0
    assert watched((0, 5.0)).run() == 0  # near its limit
    night.again, night.left = [True], 10_000.0
    asked = watched((0, 5.0))
    asked.note(signal.SIGTERM, None)
    assert asked.run() == 0


@pytest.mark.parametrize(("status", "again"), [(0, False), (supervisor.AGAIN, True), (1, False), (None, False)])
def test_a_successor_is_a_module_with_its_argument_and_says_with_its_status_whether_to_go_on(
    status: int | None, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []

    def run(words: list[str], timeout: float, check: bool) -> subprocess.CompletedProcess[str]:
        called.append(words)
        if status is None:
            raise subprocess.TimeoutExpired(words, timeout)
        return subprocess.CompletedProcess(words, status)

    monkeypatch.setattr(supervisor.subprocess, "run", run)
    assert Supervisor(["true"], "7", 30.0).call_successor("--stopped") is False
    assert called == []
    assert Supervisor(["true"], "7", 30.0, ["a.b", "/s.json"]).call_successor("--stopped") is again
    assert called[0][2:] == ["-m", "a.b", "/s.json", "--stopped"]


def test_a_job_that_may_not_be_requeued_is_told_at_once_and_a_refusal_that_lasts_after_three(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ask(command: list[str], patience_seconds: float) -> str:
        asked.append(command[1])
        raise SlurmError("Requested operation is presently disabled for job 7_3")

    monkeypatch.setattr(supervisor, "ask", ask)
    monkeypatch.setattr(supervisor, "job_state", lambda job: "RUNNING")
    monkeypatch.setattr(supervisor, "show_job", lambda job, patience_seconds: {"Requeue": "0"})
    assert requeue("7_3") is False
    assert asked == []
    monkeypatch.setattr(supervisor, "show_job", lambda job, patience_seconds: {"Requeue": "1"})
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert requeue("7_3") is False
    finally:
        signal.signal(signal.SIGTERM, before)
    assert asked == ["requeue"] * 3
    assert night.now == 2 * supervisor.PAUSE_SECONDS


class Child:
    """A command that ends after so long with that status; waiting for it moves the clock."""

    def __init__(self, night: Night, seconds: float, status: int) -> None:
        self.night, self.end, self.status = night, night.now + seconds, status

    def wait(self, timeout: float) -> int:
        if self.night.now + timeout < self.end:
            self.night.now += timeout
            raise subprocess.TimeoutExpired("x", timeout)
        self.night.now = self.end
        return self.status


@pytest.mark.parametrize(
    ("seconds", "status", "limit", "said", "at"),
    [
        (50.0, 3, 1000.0, 3, 50.0),
        (50.0, -9, 1000.0, 137, 50.0),  # as a shell says it
        (2000.0, 0, 1000.0, None, 970.0),  # 30 seconds before the limit
        (900.0, 0, float("inf"), 0, 900.0),
    ],
)
def test_a_command_runs_until_it_ends_or_the_jobs_limit_is_near(
    night: Night, monkeypatch: pytest.MonkeyPatch, seconds: float, status: int, limit: float, said: int | None, at: float
) -> None:
    asked: list[float] = []

    def left(job: str) -> float:
        asked.append(night.now)
        return limit - night.now

    monkeypatch.setattr(supervisor, "seconds_left", left)
    monkeypatch.setattr(supervisor.clients, "start", lambda command: Child(night, seconds, status))
    assert Supervisor(["true"], "7", 30.0).attempt() == said
    assert night.now == pytest.approx(at, abs=1.0)
    assert asked[:1] == [0.0]
    if at > 300:  # the limit may be changed meanwhile: it is asked for every five minutes
        assert asked[1:3] == pytest.approx([300.0, 600.0], abs=3.0)


def test_a_limit_that_was_raised_counts(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [100.0]
    monkeypatch.setattr(supervisor, "seconds_left", lambda job: (limits.pop() if limits else 10_000.0) - night.now)
    monkeypatch.setattr(supervisor.clients, "start", lambda command: Child(night, 500.0, 0))
    assert Supervisor(["true"], "7", 30.0).attempt() == 0


def test_the_time_left_is_what_slurm_says_and_no_limit_where_it_says_none(monkeypatch: pytest.MonkeyPatch) -> None:
    end = datetime.datetime.now() + datetime.timedelta(hours=1)
    monkeypatch.setattr(supervisor, "show_job", lambda job, patience_seconds: {"EndTime": f"{end:%FT%T}"})
    assert seconds_left("7") == pytest.approx(3600, abs=60)
    # The formats of SLURM_TIME_FORMAT, one of which Python takes for midnight.
    for said in ({"EndTime": t} for t in ("Unknown", "", "20:13:22", "Ystday 20:13", "20201128", "2020-11-28", "1606594402", "28 Nov")):
        monkeypatch.setattr(supervisor, "show_job", lambda job, patience_seconds, said=said: said)
        assert seconds_left("7") == float("inf")

    def silent(job: str, patience_seconds: float) -> dict[str, str]:
        raise SlurmSilentError("scontrol: no answer")

    monkeypatch.setattr(supervisor, "show_job", silent)
    assert seconds_left("7") == float("inf")


def test_requeueing_is_tried_until_slurm_takes_it_or_the_job_is_over(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    handled: list[tuple[int, object]] = []
    answers, states = ["busy", "busy", ""], ["RUNNING", "RUNNING"]

    def ask(command: list[str], patience_seconds: float) -> str:
        assert command == ["scontrol", "requeue", "7_3"]
        if said := answers.pop(0):
            raise SlurmError(said)
        return ""

    monkeypatch.setattr(supervisor, "ask", ask)
    monkeypatch.setattr(supervisor, "job_state", lambda job: states.pop(0))
    monkeypatch.setattr(supervisor, "show_job", lambda job, patience_seconds: {"Requeue": "1"})
    monkeypatch.setattr(supervisor.signal, "signal", lambda *what: handled.append(what))
    requeue("7_3")
    assert handled[1:] == [(signal.SIGTERM, signal.SIG_DFL)]  # Slurm may end this process now
    assert night.now == 2 * supervisor.PAUSE_SECONDS + supervisor.KILLED_WITHIN_SECONDS
    answers, states = ["Invalid job id"], ["CANCELLED"]
    requeue("7_3")
    assert len(handled) == 3
    assert handled[-1] != (signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize(("stop_signal", "margin"), [(120, 30.0), (8, 5.0), (20, 5.0), (1000, 60.0)])
def test_the_margin_before_the_limit_is_a_quarter_of_the_stop_signals(
    monkeypatch: pytest.MonkeyPatch, stop_signal: int, margin: float
) -> None:
    made: list[Supervisor] = []
    monkeypatch.setattr(supervisor.sys, "argv", ["supervisor", "--stop-signal-seconds", str(stop_signal), "--", "srun", "--x", "y"])
    monkeypatch.setattr(supervisor.signal, "signal", lambda *_: None)
    monkeypatch.setattr(Supervisor, "run", lambda self: made.append(self) or 7)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert supervisor.main() == 7
    assert (made[0].command, made[0].job, made[0].margin) == (["srun", "--x", "y"], "12", margin)


def test_a_requeue_ends_at_once_where_slurm_has_ended_the_job_before_scontrol_returns(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen on a real Slurm: the supervisor outlived its job for ten minutes, where no cgroup ended it."""

    def signalled(*_: object, **__: object) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return ""

    monkeypatch.setattr(supervisor, "ask", signalled)
    monkeypatch.setattr(supervisor, "show_job", lambda job, patience_seconds: {"Requeue": "1"})
    before = signal.getsignal(signal.SIGTERM)
    try:
        requeue("7_3")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert night.now == 0
