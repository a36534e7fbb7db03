"""How many jobs may be queued, and how large arrays may be, as Slurm says it."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from jobs.config import compose_job
from jobs.slurm import limits, queue
from jobs.slurm.limits import array_limit, arrays_for, is_cancelled_by_preemption, require_room, submit_limit
from jobs.slurm.queue import Queue, SlurmError

CLUSTER = compose_job(["cluster=test_cluster"]).cluster


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is printed by each command; one that is missing fails."""
    answers: dict[str, str] = {}

    def ask(command: Sequence[str], patience_seconds: float = 0.0) -> str:
        line = " ".join(command)
        found = next((text for words, text in answers.items() if words in line), None)
        if found is None:
            raise SlurmError(f"{command[0]}: not permitted")
        return found

    monkeypatch.setattr(queue, "ask", ask)
    monkeypatch.setattr(limits, "ask", ask)
    monkeypatch.setattr(queue.time, "sleep", lambda seconds: None)
    return answers


@pytest.mark.parametrize(
    ("assoc", "qos", "max_queued", "limit"),
    [
        ("4||", "||", 0, 4),
        ("||", "||", 0, None),
        ("100|50|\n", "||\n", 0, 50),
        ("100||high\n", "20||\n", 0, 20),
        ("100||", "||30", 7, 7),
        ("", "", 9, 9),
        ("Welcome\n5||\n", "\n\n||\n", 0, 5),
        (None, None, 12, 12),
        (None, None, 0, None),
    ],
)
def test_the_limit_is_the_least_of_those_that_can_be_read(
    assoc: str | None, qos: str | None, max_queued: int, limit: int | None, said: dict[str, str]
) -> None:
    said["show config"] = "ClusterName = mini\n"
    said |= {key: text for key, text in {"show assoc": assoc, "show qos": qos}.items() if text is not None}
    assert submit_limit(replace(CLUSTER, max_queued=max_queued)) == limit


@pytest.mark.parametrize(
    ("config", "limit"), [("MaxArraySize = 1\n", 1), ("MaxArraySize = 0\n", 0), ("ClusterName = x\n", 1001), ("", 1001)]
)
def test_an_arrays_limit(config: str, limit: int, said: dict[str, str]) -> None:
    said["show config"] = config
    assert array_limit() == limit


@pytest.mark.parametrize(
    ("fields", "partition", "qos", "cancelled"),
    [
        ("PreemptTime=None Requeue=0", "CANCEL", "cancel", False),  # a person did it
        ("PreemptTime=2026-11-28T20:00:00 Requeue=0", "REQUEUE", "cluster", True),
        ("PreemptTime=2026-11-28T20:00:00 Requeue=1", "REQUEUE", "cluster", False),
        ("PreemptTime=2026-11-28T20:00:00 Requeue=1", "CANCEL", "cluster", True),
        ("PreemptTime=2026-11-28T20:00:00 Requeue=1", "REQUEUE", "cancel", True),
    ],
)
def test_a_preempted_job_is_over_where_slurm_does_not_start_it_again(
    fields: str, partition: str, qos: str, cancelled: bool, said: dict[str, str]
) -> None:
    said["show job"] = f"JobId=7 JobState=COMPLETING QOS=normal Partition=gpu {fields}"
    said["show partition"] = f"PartitionName=gpu PreemptMode={partition}"
    said["show qos"] = qos
    assert is_cancelled_by_preemption("7") is cancelled
    said.pop("show job")
    assert not is_cancelled_by_preemption("7")


@pytest.mark.parametrize(
    ("parts", "arrays", "max_parallel", "room", "expected"),
    [
        (5, 1001, 0, None, [(5, 5)]),
        (5, 1001, 2, None, [(2, 2)]),
        (5, 1001, 0, 3, [(3, 3)]),
        (5, 4, 0, None, [(4, 4)]),
        (5, 1, 0, None, [(1, 0)] * 5),
        (5, 0, 2, None, [(1, 0)] * 2),
        (5, 1, 0, 3, [(1, 0)] * 3),
        (500, 0, 0, None, [(1, 0)] * 100),
    ],
)
def test_work_that_any_number_of_jobs_can_share_is_one_array_or_single_jobs_and_fits(
    parts: int, arrays: int, max_parallel: int, room: int | None, expected: list[tuple[int, int]], said: dict[str, str]
) -> None:
    said["show config"] = f"MaxArraySize = {arrays}\n"
    assert arrays_for(parts, replace(CLUSTER, max_parallel=max_parallel), room) == expected


def test_the_room_is_what_the_limit_leaves_beside_all_jobs_of_the_user(said: dict[str, str]) -> None:
    said["squeue"] = "7_3|RUNNING|0|None|gpu01|x|\n8|COMPLETED|0|None|gpu01|x|\n9|PENDING|0|None||y|\n"
    assert require_room(replace(CLUSTER, max_queued=5), Queue(0)) == 3
    assert require_room(CLUSTER, Queue(0)) is None
    with pytest.raises(ValueError, match=r"^jobs of this user that are queued must be at most 2; got 2, "):
        require_room(replace(CLUSTER, max_queued=2), Queue(0))
