"""What each state that Slurm documents means to us; Slurm's own words are put in its mouth."""

from collections.abc import Callable, Sequence

import pytest

from jobs.slurm import queue as slurm
from jobs.slurm.queue import GONE, Element, Queue, own_job, own_restart

# squeue(1), JOB STATE CODES: whether a job in that state has run for the last time unless it is requeued, and whether the accounting's
# word for it is the last one. What the machine did to a job (a node that failed, preemption) may be on record before Slurm requeues the
# job by itself; what the run or a person did to it is final.
STATES = {
    "BOOT_FAIL": (True, False),
    "CANCELLED": (True, True),
    "COMPLETED": (True, True),
    "CONFIGURING": (False, False),
    "COMPLETING": (False, False),
    "DEADLINE": (True, True),
    "FAILED": (True, True),
    "NODE_FAIL": (True, False),
    "OUT_OF_MEMORY": (True, True),
    "PENDING": (False, False),
    "PREEMPTED": (True, False),
    "RUNNING": (False, False),
    "RESV_DEL_HOLD": (False, False),
    "REQUEUE_FED": (False, False),
    "REQUEUE_HOLD": (False, False),
    "REQUEUED": (False, False),
    "RESIZING": (False, False),
    "REVOKED": (True, False),
    "SIGNALING": (False, False),
    "SPECIAL_EXIT": (False, False),
    "STAGE_OUT": (False, False),
    "STOPPED": (False, False),
    "SUSPENDED": (False, False),
    "TIMEOUT": (True, True),
}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What squeue and sacct print, by their names; both count how often they were asked."""
    answers = {"squeue": "", "sacct": "", "asked": ""}

    def ask(command: Sequence[str], patience_seconds: float = 0.0) -> str:
        answers["asked"] += f"{command[0]} "
        return answers[command[0]]

    monkeypatch.setattr(slurm, "ask", ask)
    return answers


@pytest.mark.parametrize("state", STATES)
def test_a_listed_job_has_ended_in_the_states_that_end_one(state: str, said: dict[str, str]) -> None:
    said["squeue"] = f"7_3|{state}|2|None|gpu01|x-0001|\n"
    queue = Queue(refresh_seconds=0)
    (element,) = queue.named("x-")
    assert element == Element("7_3", state, 2, "None", "gpu01", "x-0001")
    assert element.ended is STATES[state][0]
    assert queue.state("7_3") == state
    assert "sacct" not in said["asked"]


@pytest.mark.parametrize("state", STATES)
def test_the_accountings_word_is_final_where_nothing_but_a_person_could_start_the_job_again(state: str, said: dict[str, str]) -> None:
    said["sacct"] = f"7_3|{state} by 1000\n"
    queue = Queue(refresh_seconds=0)
    assert queue.state("7_3") == (state if STATES[state][1] else GONE)
    said["squeue"] = "7_3|RUNNING|1|None|gpu01|x-0001|\n"  # Slurm has requeued it
    assert queue.state("7_3") == (state if STATES[state][1] else "RUNNING")


def test_the_accounting_is_asked_once_for_each_look_and_never_again_of_what_is_final(said: dict[str, str]) -> None:
    said["sacct"] = "7_3|NODE_FAIL\n"
    queue = Queue(refresh_seconds=1000)
    assert [queue.state("7_3") for _ in range(3)] == [GONE] * 3
    assert said["asked"] == "squeue sacct "
    said["sacct"], said["asked"] = "7_3|TIMEOUT\n", ""
    queue = Queue(refresh_seconds=0)
    assert [queue.state("7_3") for _ in range(3)] == ["TIMEOUT"] * 3
    assert said["asked"] == "squeue sacct "


@pytest.mark.parametrize(
    ("error", "state"),
    [("sacct: Slurm accounting storage is disabled", GONE), ("sacct: connection refused", "")],
)
def test_a_site_without_accounting_knows_nothing_more_and_a_silent_one_leaves_it_open(
    error: str, state: str, said: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue: Callable[..., str] = slurm.ask

    def ask(command: Sequence[str], patience_seconds: float = 0.0) -> str:
        if command[0] == "sacct":
            raise slurm.SlurmSilentError(error)
        return squeue(command, patience_seconds)

    monkeypatch.setattr(slurm, "ask", ask)
    assert Queue(refresh_seconds=0).state("7_3") == state


def test_pauses_between_questions_double_up_to_a_quarter_of_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, pauses = [0.0], []

    def sleep(seconds: float) -> None:
        clock[0] += seconds
        pauses.append(seconds)

    class Silent:
        returncode, stdout, stderr = 1, "", "Unable to contact slurm controller"

    monkeypatch.setattr(slurm.clients, "run", lambda *_: Silent())
    monkeypatch.setattr(slurm.time, "sleep", sleep)
    monkeypatch.setattr(slurm.time, "monotonic", lambda: clock[0])
    with pytest.raises(slurm.SlurmSilentError, match="squeue: Unable to contact slurm controller"):
        slurm.ask(["squeue"], 60.0)
    assert pauses == [1, 2, 4, 8, 15, 15, 15]  # 60 seconds, the last of which still counts
    with pytest.raises(slurm.SlurmSilentError):
        slurm.ask(["squeue"], 0)
    assert len(pauses) == 7


@pytest.mark.parametrize(
    ("environment", "job", "restart"),
    [
        ({}, "", 0),
        ({"SLURM_JOB_ID": "17"}, "17", 0),
        ({"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "3"}, "17", 3),
        # The last element of array 7 bears the array's own number.
        ({"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4"}, "7_4", 0),
    ],
)
def test_a_job_knows_its_own_name(environment: dict[str, str], job: str, restart: int) -> None:
    assert (own_job(environment), own_restart(environment)) == (job, restart)
