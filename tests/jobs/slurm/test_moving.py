"""When a supervisor takes its job to another node; Slurm's commands and the clock are ours."""

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs.cli import INTERRUPTED, MOVED
from jobs.slurm import queue, supervisor
from jobs.slurm.hangs import DUMP_SIGNAL
from jobs.slurm.nodes import Fault, FaultKind, Nodes
from jobs.slurm.queue import SlurmError
from jobs.slurm.supervisor import DEATHS_ALLOWED, Supervisor, requeue


class Job:
    """Job 7_3 on node a of three, whose command ends so, each time at once."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes, self.patch, self.requeued = Nodes(folder / "nodes"), monkeypatch, []  # type: ignore[var-annotated]
        self.nodes.know(["a", "b", "c"], 1)
        self.state, self.ends = "RUNNING", []  # type: ignore[var-annotated]
        monkeypatch.setenv("SLURM_JOB_NODELIST", "a")
        monkeypatch.setenv("SLURMD_NODENAME", "a")
        monkeypatch.setattr(supervisor, "job_state", lambda job: self.state)
        monkeypatch.setattr(supervisor, "requeue", lambda job, avoid=(): self.requeued.append((job, list(avoid))))
        monkeypatch.setattr(supervisor, "exclude", lambda job, nodes: None)
        monkeypatch.setattr(supervisor, "PAUSE_SECONDS", 0)

    def supervisor(self, *ends: int) -> Supervisor:
        made, left = Supervisor(["true"], "7_3", 30.0, nodes=self.nodes.folder), list(ends)
        self.patch.setattr(made, "attempt", lambda: left.pop(0))
        return made

    def fault(self, trial: str, node: str, kind: FaultKind) -> None:
        self.nodes.record(Fault(trial, 1, "7_1", [node], kind, f"{kind.name} there", time.time()))


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


def test_a_rank_that_says_so_moves_the_job(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job.supervisor()

    def attempt() -> int:
        job.fault("t2", "a", FaultKind.node)
        return MOVED

    monkeypatch.setattr(made, "attempt", attempt)
    assert made.run() == INTERRUPTED
    assert job.requeued == [("7_3", ["a"])]


def test_a_job_that_starts_on_an_avoided_node_leaves_it_before_its_ranks_start(job: Job) -> None:
    job.fault("t1", "a", FaultKind.node)
    made = job.supervisor()
    assert made.run() == INTERRUPTED
    assert job.requeued == [("7_3", ["a"])]


@pytest.mark.parametrize(("status", "state", "moves"), [(3, "RUNNING", True), (143, "RUNNING", False), (3, "CANCELLED", False)])
def test_a_setup_that_ends_the_job(job: Job, status: int, state: str, moves: bool) -> None:
    job.state = state
    assert job.supervisor().leave(status) == (INTERRUPTED if moves else status)
    assert [f.kind for f in job.nodes.live()] == [FaultKind.setup] * moves
    assert job.requeued == [("7_3", ["a"])] * moves


def test_ranks_that_never_begin_a_trial_are_a_fault_of_the_node_and_then_of_the_job(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert job.supervisor(*[2] * DEATHS_ALLOWED).run() == INTERRUPTED
    assert job.requeued == [("7_3", ["a"])]
    monkeypatch.setenv("SLURM_JOB_NODELIST", "b")
    assert job.supervisor(*[2] * DEATHS_ALLOWED).run() == 2
    assert len(job.requeued) == 1
    assert "on b; the same happened on another node, or too many are avoided, so the job ends" in capsys.readouterr().out
    assert job.nodes.avoided() == {}


def test_with_one_node_one_line_and_the_end(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.nodes.know(["a"], 1)
    assert job.supervisor().leave(3) == 3
    assert job.requeued == []
    assert capsys.readouterr().out.count("\n") == 1


def test_a_second_hang_on_the_node_moves_the_job(job: Job) -> None:
    for attempt, ended in ((1, 0), (2, INTERRUPTED)):
        made = job.supervisor(154, 0)
        job.nodes.record(Fault("t1", attempt, "7_3", ["a"], FaultKind.hang, "no step for 9 min", time.time()))
        made.hung = ("t1", attempt, "no step for 9 min")
        assert made.run() == ended
    assert job.requeued == [("7_3", ["a"])]


def test_ranks_that_hang_are_told_to_write_their_stacks_and_a_stopped_one_to_go_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[str]] = []
    monkeypatch.setattr(supervisor, "ask", lambda command, patience_seconds=0: asked.append(command))

    class Child:
        """A command that ends as soon as it is told to."""

        def wait(self, timeout: float = 0) -> int:
            return 154

        def poll(self) -> int:
            return 154

        def kill(self) -> None:
            pass

    made = job.supervisor()
    made.hung = ("t1", 2, "no step for 12 min, usually 0.8 s")
    assert made.end_hung(Child()) == 154  # type: ignore[arg-type]
    assert asked == [["scancel", f"--signal={DUMP_SIGNAL}", "7_3"], ["scancel", "--signal=18", "7_3"]]
    assert job.nodes.has("t1", 2)


def test_ranks_that_outlive_a_hang_are_ended_by_srun_before_it_is_killed(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "ask", lambda command, patience_seconds=0: "")
    told: list[str] = []

    class Child:
        """A command that ends when it is terminated."""

        def wait(self, timeout: float = 0) -> int:
            if not told:
                raise subprocess.TimeoutExpired("srun", timeout)
            return -15

        def poll(self) -> int | None:
            return -15 if told else None

        def terminate(self) -> None:
            told.append("terminate")

        def kill(self) -> None:
            told.append("kill")

    made = job.supervisor()
    made.hung = ("t1", 2, "no step for 12 min, usually 0.8 s")
    assert made.end_hung(Child()) == 143  # type: ignore[arg-type]
    assert told == ["terminate", "kill"]


def test_a_requeued_job_is_held_if_slurm_cannot_keep_it_off_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(supervisor, "ask", lambda command, patience_seconds=0: asked.append(" ".join(command)))
    monkeypatch.setattr(supervisor, "KILLED_WITHIN_SECONDS", 0)

    def refused(job: str, nodes: Sequence[str]) -> None:
        raise SlurmError("scontrol: access denied")

    monkeypatch.setattr(supervisor, "exclude", refused)
    requeue("7_3", ["a"])
    assert asked == ["scontrol requeue 7_3", "scontrol hold 7_3"]


def test_what_a_job_excludes_already_stays_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[str]] = []
    monkeypatch.setattr(queue, "ask", lambda command, patience_seconds=0: asked.append(command))
    for known, listed in (("(null)", "a,b"), ("gpu[01-02],a", "gpu01,gpu02,a,b")):
        monkeypatch.setattr(queue, "show_job", lambda job, known=known: {"ExcNodeList": known})
        queue.exclude("7_3", ["a", "b"])
        assert asked[-1] == ["scontrol", "update", "JobId=7_3", f"ExcNodeList={listed}"]


@pytest.mark.parametrize(("partition", "nodes"), [("", ["a", "b"]), ("gpu", ["a", "b", "e"])])
def test_the_nodes_that_can_run_jobs(partition: str, nodes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "a|gpu*|idle",
        "b|gpu*|allocated",
        "c|gpu*|draining",
        "d|gpu*|down*",
        "d2|gpu*|idle*",
        "e|other|mixed",
        "a banner of the site",
        "a|other|idle",
        "site policy|gpu*|3 of idle",
    ]
    monkeypatch.setattr(queue, "ask", lambda command, patience_seconds=0: "\n".join(lines))
    assert queue.nodes_of(partition) == nodes


def test_without_an_answer_no_node_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(command: Sequence[str], patience_seconds: float = 0) -> str:
        raise SlurmError("sinfo: no answer")

    monkeypatch.setattr(queue, "ask", silent)
    assert queue.nodes_of("gpu") == []
