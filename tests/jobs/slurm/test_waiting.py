"""Why jobs wait, in one line each, and which never start as they are; Slurm's own words are put in its mouth."""

from collections.abc import Sequence

import pytest

from jobs.slurm import queue as slurm
from jobs.slurm import waiting as module
from jobs.slurm.queue import Element, SlurmSilentError
from jobs.slurm.waiting import tres_of, waiting


def job(number: str, reason: str, start: str = "N/A", state: str = "PENDING") -> Element:
    return Element(number, state, 0, reason, "", "x-0001", "2026-11-28T20:00:00", start)


def test_jobs_of_one_array_that_wait_for_the_same_are_one_line_with_the_first_expected_start() -> None:
    found = waiting(
        [
            job("7_0", "None", state="RUNNING"),
            job("7_1", "Resources", "2026-11-29T10:00:00"),
            job("7_2", "Resources", "2026-11-29T09:00:00"),
            job("7_3", "JobArrayTaskLimit"),
            job("8", "Priority"),
            job("9", "None"),
        ]
    )
    assert [w.line for w in found] == [
        "2 jobs of array 7 wait: Resources, expected to start at 2026-11-29T09:00:00",
        "job 7_3 waits: JobArrayTaskLimit",
        "job 8 waits: Priority",
        "job 9 waits: Slurm has not looked at it yet",
    ]
    assert not any(w.remedy for w in found)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("PartitionNodeLimit", "nodes_per_trial"),
        ("PartitionTimeLimit", "time_limit_minutes"),
        ("BadConstraints", "sbatch.constraint"),
        ("QOSMaxWallDurationPerJobLimit", "lower time_limit_minutes"),
        ("AssocMaxWallDurationPerJobLimit", "lower time_limit_minutes"),
        ("QOSMaxCpuPerJobLimit", "lower what a trial takes"),
        ("AssocMaxGRESPerJob", "lower what a trial takes"),
        ("QOSMaxGRESPerNode", "limit of a node"),
        ("QOSMinGRES", "another qos"),
        ("AssocGrpCPUMinutesLimit", "budget"),
        ("QOSGrpBillingMinutes", "budget"),
        ("AccountNotAllowed", "set account"),
        ("InvalidQOS", "set qos"),
        ("DependencyNeverSatisfied", "run the sweep's command again"),
        ("ReqNodeNotAvail, UnavailableNodes:gpu[01-02]", "gpu[01-02]"),
    ],
)
def test_a_job_that_can_never_start_is_said_to_be_one_with_the_remedy(reason: str, said: str) -> None:
    (found,) = waiting([job("7_0", reason)])
    assert found.line.startswith(f"job 7_0 waits and cannot start: {reason}: ")
    assert said in found.remedy


@pytest.mark.parametrize("reason", ["JobHeldUser", "JobHeldAdmin", "launch failed requeued held", "job requeued in held state"])
def test_a_held_job_is_released_by_a_person(reason: str) -> None:
    assert [w.line for w in waiting([job("7_0", reason)])] == [f"job 7_0 is held ({reason}); to release: scontrol release 7_0"]
    (both,) = waiting([job("7_0", reason), job("7_1", reason)])
    assert both.line == f"2 jobs of array 7 are held ({reason}); to release: scontrol release 7_0,7_1"


@pytest.mark.parametrize(
    "reason",
    [
        *("Priority", "Resources", "Dependency", "BeginTime", "Licenses", "Reservation"),
        *("AssocGrpCPURunMinutesLimit", "QOSGrpMemRunMinutes", "ReqNodeNotAvail, Reserved for maintenance"),
    ],
)
def test_a_reason_that_passes_needs_no_remedy(reason: str) -> None:
    assert not waiting([job("7_0", reason)])[0].remedy


@pytest.mark.parametrize(
    ("number", "reason", "limits", "never"),
    [
        (20, "AssocGrpGRES", "gres/gpu=8|\n", False),  # others use them
        (21, "AssocGrpGRES", "gres/gpu=2|\n", True),
        (22, "AssocGrpCpuLimit", "cpu=100,gres/gpu=2|\n", False),
        (23, "AssocGrpCpuLimit", "|cpu=15\n", True),
        (24, "QOSGrpMemLimit", "mem=16000M||\n", True),
        (25, "QOSGrpMemLimit", "mem=64G||\n", False),
        (26, "QOSMaxCpuPerUserLimit", "|cpu=8|\n", True),
        (27, "QOSMaxGRESPerUser", "|gres/gpu=4|\n", False),
        (28, "QOSMaxNodePerUserLimit", "||\n", False),
    ],
)
def test_a_limit_of_all_jobs_together_is_for_ever_where_one_job_alone_exceeds_it(
    number: int, reason: str, limits: str, never: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = f"JobId={number} UserId=me(7) Account=proj QOS=normal JobState=PENDING TRES=cpu=16,mem=32G,node=1,billing=16,gres/gpu=4"

    def ask(command: Sequence[str], patience_seconds: float = 0.0) -> str:
        return {"scontrol": shown, "sacctmgr": limits}[command[0]]

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.setattr(module, "ask", ask)
    (found,) = waiting([job(str(number), reason)])
    assert bool(found.remedy) is never
    assert ("the limit of all jobs together" in found.line) is never


def test_while_slurm_is_silent_about_a_limit_nothing_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(command: Sequence[str], patience_seconds: float = 0.0) -> str:
        raise SlurmSilentError("no answer")

    monkeypatch.setattr(slurm, "ask", silent)
    assert [w.line for w in waiting([job("31", "AssocGrpGRES")])] == ["job 31 waits: AssocGrpGRES"]


def test_resources_are_parsed() -> None:
    assert tres_of("cpu=4,mem=8G,gres/gpu:a100=2,node=1") == {"cpu": 4, "mem": 8192, "gres/gpu:a100": 2, "node": 1}
    assert tres_of("") == {}
