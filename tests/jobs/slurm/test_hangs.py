"""A job's look at the steps of its run, without Slurm."""

import os
from pathlib import Path

import pytest

from cnnjepa.run.pace import Pace, file_of
from jobs.slurm import hangs
from jobs.slurm.hangs import StepWatch, pointer, watched


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
