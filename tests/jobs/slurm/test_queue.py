"""What each state that Slurm documents means to us; Slurm's own words are put in its mouth."""

import datetime
from collections.abc import Callable, Sequence

import pytest

from jobs.slurm import queue as slurm
from jobs.slurm.queue import EMPTY_SECONDS, GONE, SECOND_LOOK_SECONDS, UNLISTED, Element, Queue, own_job, own_restart

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


COLUMNS = "JOBID|STATE|RESTARTS|REASON|NODELIST|NAME|SUBMIT_TIME|START_TIME|\n"  # all that squeue prints where nothing is queued


class Clock:
    """Time that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(slurm.time, "monotonic", lambda: made.now)
    return made


def second_look(queue: Queue, clock: Clock, job: str = "7_3") -> str:
    """The state of the job after a first look that lacks it and another one, some time later."""
    queue.state(job)
    clock.now += SECOND_LOOK_SECONDS
    return queue.state(job)


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
def test_the_accountings_word_is_final_where_nothing_but_a_person_could_start_the_job_again(
    state: str, said: dict[str, str], clock: Clock
) -> None:
    said |= {"sacct": f"7_3|{state} by 1000|x-0001\n", "squeue": COLUMNS}
    queue = Queue(refresh_seconds=0)
    assert queue.state("7_3") == (state if STATES[state][1] else UNLISTED)
    assert second_look(queue, clock) == (state if STATES[state][1] else GONE)
    said["squeue"] = "7_3|RUNNING|1|None|gpu01|x-0001|\n"  # Slurm has requeued it
    assert queue.state("7_3") == (state if STATES[state][1] else "RUNNING")


def test_the_accounting_is_asked_once_for_each_look_and_never_again_of_what_is_final(said: dict[str, str]) -> None:
    said["sacct"] = "7_3|NODE_FAIL\n"
    queue = Queue(refresh_seconds=1000)
    assert [queue.state("7_3") for _ in range(3)] == [UNLISTED] * 3
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
    error: str, state: str, said: dict[str, str], monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    said["squeue"] = COLUMNS
    squeue: Callable[..., str] = slurm.ask

    def ask(command: Sequence[str], patience_seconds: float = 0.0) -> str:
        if command[0] == "sacct":
            raise slurm.SlurmSilentError(error)
        return squeue(command, patience_seconds)

    monkeypatch.setattr(slurm, "ask", ask)
    assert second_look(Queue(refresh_seconds=0), clock) == state


LISTED = "7_3|RUNNING|0|None|gpu01|x-0001|2026-11-28T20:00:00|N/A|\n"


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        ("", EMPTY_SECONDS),  # as a failing client or a wrapper gives
        ("\n Welcome to the cluster\n\n", EMPTY_SECONDS),
        (COLUMNS, SECOND_LOOK_SECONDS),  # Slurm's own empty list
        ("12|RUNNING|0|None|gpu02|another|\n", SECOND_LOOK_SECONDS),
        (LISTED.replace("7_3", "7_4"), SECOND_LOOK_SECONDS),
    ],
)
def test_a_job_that_one_answer_lacks_is_gone_at_a_second_look_later(
    answer: str, seconds: float, said: dict[str, str], clock: Clock
) -> None:
    said["squeue"] = LISTED
    queue = Queue(refresh_seconds=0)
    assert queue.state("7_3") == "RUNNING"
    said["squeue"] = answer
    for passed in (0.0, seconds - 1):
        clock.now += passed
        assert queue.state("7_3") == "RUNNING"
        assert "7_3" in queue.elements()
    said["squeue"] = LISTED  # it was but that answer
    assert queue.state("7_3") == "RUNNING"
    said["squeue"] = answer
    clock.now += seconds
    assert queue.state("7_3") == "RUNNING"
    clock.now += seconds
    assert queue.state("7_3") == GONE
    assert "7_3" not in queue.elements()


def test_a_job_is_known_by_its_name_beside_its_number(said: dict[str, str], clock: Clock) -> None:
    said |= {"squeue": LISTED, "sacct": "8_1|CANCELLED by 0|somebody-elses\n8_1|TIMEOUT|y-0001\n"}
    queue = Queue(refresh_seconds=0)
    assert queue.state("7_3", "x-0001") == "RUNNING"
    assert queue.state("7_3", "y-0001") == GONE  # numbers come again
    assert queue.state("8_1", "x-0001") == UNLISTED
    assert queue.state("8_1", "y-0001") == "TIMEOUT"


@pytest.mark.parametrize(("here", "elsewhere"), [("mini", False), ("other", True), ("", False)])
def test_the_cluster_is_known_by_its_name(here: str, elsewhere: bool, said: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CLUSTER_NAME", raising=False)
    said["scontrol"] = f"ClusterName             = {here}\n" if here else "MaxArraySize = 5\n"
    queue = Queue()
    assert [queue.is_elsewhere("mini") for _ in range(3)] == [elsewhere] * 3
    assert said["asked"] == "scontrol "
    assert not queue.is_elsewhere("")  # of a claim that does not say
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "mini")
    assert not Queue().is_elsewhere("mini")


def test_a_job_that_was_submitted_long_before_is_older_and_one_without_a_time_is_not() -> None:
    def job(submitted: str) -> Element:
        return Element("7_3", "RUNNING", 0, "None", "", "x-0001", submitted)

    when = datetime.datetime(2026, 11, 28, 20, 0).timestamp()
    assert job("2026-11-28T19:00:00").is_older_than(when)
    assert not job("2026-11-28T19:55:00").is_older_than(when)  # two clocks
    assert not any(job(text).is_older_than(when) for text in ("2026-11-28T20:30:00", "N/A", ""))


def test_silence_between_two_looks_proves_nothing(said: dict[str, str], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(refresh_seconds=0)
    said["squeue"] = COLUMNS
    assert queue.state("7_3") == UNLISTED
    answers = slurm.ask

    def silent(command: Sequence[str], patience_seconds: float = 0.0) -> str:
        raise slurm.SlurmSilentError("no answer")

    monkeypatch.setattr(slurm, "ask", silent)
    clock.now += 1000
    assert queue.state("7_3") == ""
    monkeypatch.setattr(slurm, "ask", answers)
    said["squeue"] = LISTED
    assert queue.state("7_3") == "RUNNING"


ENDED_ARRAY = "7_0|x-0001|COMPLETED\n7_1|x-0001|CANCELLED by 0\n"


@pytest.mark.parametrize(
    ("accounting", "age", "in_doubt"),
    [
        (ENDED_ARRAY, 5.0, False),
        (ENDED_ARRAY + "7_[2-3%1]|x-0001|PENDING\n", 5000.0, True),
        (ENDED_ARRAY + "7_2|x-0001|NODE_FAIL\n", 5000.0, True),  # Slurm may requeue it
        (ENDED_ARRAY.replace("x-", "y-"), 5000.0, True),  # numbers come again
        ("", 5000.0, True),
    ],
)
def test_an_array_that_is_not_listed_is_in_doubt_until_the_accounting_or_a_second_look_says_that_it_is_over(
    accounting: str, age: float, in_doubt: bool, said: dict[str, str], clock: Clock
) -> None:
    said |= {"sacct": accounting, "squeue": COLUMNS}
    queue = Queue(refresh_seconds=0)
    assert queue.in_doubt({"7": ("x-0001", age)}) == ({"7"} if in_doubt else set())
    clock.now += SECOND_LOOK_SECONDS
    assert queue.in_doubt({"7": ("x-0001", age)}) == set()


def test_a_young_array_is_in_doubt_also_at_a_second_look_and_one_of_which_an_element_is_listed_never(
    said: dict[str, str], clock: Clock
) -> None:
    said["squeue"] = LISTED
    queue = Queue(refresh_seconds=0)
    for _ in range(3):  # a site's squeue may answer from a minute ago
        assert queue.in_doubt({"7": ("x-0001", 3.0), "8": ("x-0002", EMPTY_SECONDS - 1)}) == {"8"}
        clock.now += SECOND_LOOK_SECONDS
    assert queue.in_doubt({"8": ("x-0002", EMPTY_SECONDS + 1)}) == set()
    assert queue.in_doubt({"7": ("z-0001", 100.0)}) == {"7"}  # what is listed as 7 bears another name


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
