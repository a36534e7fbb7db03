"""A job's look at the steps of its run, and what it does to real processes that hang, without Slurm."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from cnnjepa.run.pace import Pace, file_of
from jobs.slurm import hangs, supervisor
from jobs.slurm.hangs import StepWatch, pointer, watched
from jobs.slurm.nodes import FaultKind
from jobs.slurm.supervisor import Supervisor
from tests.support.held import wait_until


class Watched:
    """A watch that looks when it is told to, at a time of ours."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(hangs.time, "monotonic", lambda: self.now)
        self.run, self.file = folder / "trials" / "abc", pointer(folder, "7_1")
        self.run.mkdir(parents=True)
        self.watch = StepWatch(self.file, look_seconds=1e6)
        self.watch.close()

    def after(self, seconds: float) -> tuple[str, int, str]:
        self.now += seconds
        self.watch._look()
        return self.watch.hung()


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(tmp_path, monkeypatch)


def touch(seen: Watched, attempt: int, when: float) -> None:
    os.utime(file_of(seen.run, attempt), (when, when))


def test_a_run_hangs_once_its_file_has_stood_still_for_its_limit(seen: Watched) -> None:
    made = Pace(seen.run, 4, hang_minutes=1)
    made.begin("training", 60)
    with watched(seen.file, seen.run, 4):
        assert seen.after(1) == ("", 0, "")
        assert seen.after(59) == ("", 0, "")
        touch(seen, 4, 5.0)  # of a clock that is years behind: only that it changes counts
        assert seen.after(30) == ("", 0, "")
        assert seen.after(50) == ("", 0, "")
        trial, attempt, cause = seen.after(11)
        assert (trial, attempt) == ("abc", 4)
        assert cause.startswith("no step for 61 s")


def test_without_a_run_or_its_file_nothing_hangs(seen: Watched) -> None:
    assert seen.after(1e6) == ("", 0, "")
    with watched(seen.file, seen.run, 1):  # a task that says nothing of its steps
        assert seen.after(1e6) == ("", 0, "")
    assert not seen.file.exists()


def test_the_next_trial_of_a_job_has_a_clock_of_its_own(seen: Watched) -> None:
    for attempt in (1, 2):
        Pace(seen.run, attempt).begin("training", 60)
    with watched(seen.file, seen.run, 1):
        assert seen.after(1) == ("", 0, "")
    with watched(seen.file, seen.run, 2):
        assert seen.after(61) == ("", 0, "")
        assert seen.after(61)[:2] == ("abc", 2)


# A rank: it says where it runs, does one step, and hangs with a limit of half a second.
RANK = """
import os, signal, sys, threading, time
from pathlib import Path
from cnnjepa.run.pace import Pace
from jobs.slurm.hangs import stacks_to, watched

folder = Path(sys.argv[1])
run = folder / "trials" / "abc"

def here_it_hangs():
    {how}

with stacks_to(open(folder / "stacks", "a")), watched(folder / "log" / "7_1.run", run, 3):
    Pace(run, 3).begin("training", 0.5)
    (folder / "pid").write_text(str(os.getpid()))
    here_it_hangs()
"""


@pytest.mark.parametrize(
    "how",
    [
        "time.sleep(1000)",
        "os.open(folder / 'fifo', os.O_RDONLY)",  # nobody writes there
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    ],
)
def test_a_rank_that_hangs_writes_its_stack_and_ends(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trials" / "abc").mkdir(parents=True)
    os.mkfifo(tmp_path / "fifo")

    def ask(command: Sequence[str], patience_seconds: float = 0) -> str:
        pid = tmp_path / "pid"
        wait_until("the rank", pid.exists, lambda: True)
        os.kill(int(pid.read_text()), int(command[1].partition("=")[2]))
        return ""

    monkeypatch.setattr(supervisor, "ask", ask)
    monkeypatch.setattr(supervisor, "seconds_left", lambda job: float("inf"))
    monkeypatch.setattr(supervisor, "StepWatch", lambda file: StepWatch(file, look_seconds=0.05))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "a")
    made = Supervisor([sys.executable, "-c", RANK.format(how=how), str(tmp_path)], "7_1", 30.0, nodes=tmp_path / "nodes")
    assert made.attempt() == 128 + hangs.DUMP_SIGNAL
    assert made.hung[:2] == ("abc", 3)
    assert "in here_it_hangs" in (tmp_path / "stacks").read_text()
    (fault,) = supervisor.Nodes(tmp_path / "nodes").live()
    assert (fault.trial, fault.attempt, fault.kind, fault.nodes) == ("abc", 3, FaultKind.hang, ["a"])
