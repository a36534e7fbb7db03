"""What a run says about its steps, for others to tell a hang from a slow run; the clock is ours."""

import os
from pathlib import Path

import pytest

from cnnjepa.run import pace
from cnnjepa.run.pace import SHORTEST_SECONDS, STARTING_SECONDS, Beat, Pace


class Clock:
    """Seconds that only the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def steps(made: Pace, clock: Clock, seconds: float, count: int) -> None:
    for _ in range(count):
        clock.now += seconds
        made.step()


def test_the_limit_follows_from_the_runs_own_steps_and_is_ten_minutes_at_least(tmp_path: Path, clock: Clock) -> None:
    made = Pace(tmp_path, 3, clock=clock)
    made.train()
    steps(made, clock, 40.0, 1)  # compiles
    steps(made, clock, 0.8, 30)
    found = pace.read(pace.file_of(tmp_path, 3))
    assert found is not None
    assert (found.phase, round(found.usual, 1), found.limit) == ("training", 0.8, SHORTEST_SECONDS)
    steps(made, clock, 30.0, 60)
    assert made.step_limit == pytest.approx(3000, rel=0.05)
    found = pace.read(pace.file_of(tmp_path, 3))
    assert found is not None
    assert found.limit == pytest.approx(3000, rel=0.3), "what is written follows"


def test_one_long_step_raises_the_limit(tmp_path: Path, clock: Clock) -> None:
    made = Pace(tmp_path, 1, clock=clock)
    made.train()
    steps(made, clock, 1.0, 5)
    steps(made, clock, 300.0, 1)
    assert made.step_limit >= 3000


def test_a_given_limit_holds_for_steps_and_not_for_the_start_and_probes(tmp_path: Path, clock: Clock) -> None:
    made = Pace(tmp_path, 1, hang_minutes=0.5, clock=clock)
    made.train()
    assert pace.read(pace.file_of(tmp_path, 1)).limit == STARTING_SECONDS  # type: ignore[union-attr]
    steps(made, clock, 0.1, 3)
    assert pace.read(pace.file_of(tmp_path, 1)).limit == 30  # type: ignore[union-attr]
    with made.within("probing", 7200):
        clock.now += 5000
        found = pace.read(pace.file_of(tmp_path, 1))
        assert found is not None
        assert (found.phase, found.usual, found.limit) == ("probing", pytest.approx(0.1), 7200)
    assert pace.read(pace.file_of(tmp_path, 1)).limit == 30  # type: ignore[union-attr]
    steps(made, clock, 0.1, 1)
    assert made.step_limit == 30, "the time of the probe is no step's"


def test_a_file_says_when_steps_began_and_when_the_last_one_was_done(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace.time, "time", lambda: 1e9 + clock.now)
    made = Pace(tmp_path, 1, clock=clock)

    def found() -> Beat:
        beat = pace.read(pace.file_of(tmp_path, 1))
        assert beat is not None
        return beat

    made.begin("starting", 60.0)
    made.train()
    assert (found().began, found().last_step) == (0.0, 0.0)
    steps(made, clock, 40.0, 1)
    assert found().began == 1e9 + 140.0
    steps(made, clock, 0.8, 30)
    with made.within("probing", 7200):
        clock.now += 500
        assert (found().began, found().last_step) == (1e9 + 140.0, pytest.approx(1e9 + 164.0))
    os.utime(pace.file_of(tmp_path, 1), (2e9, 2e9))
    assert found().last_step == 2e9, "while it trains, each step touches the file"


def test_a_file_is_touched_once_a_second_at_most(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Pace(tmp_path, 1, clock=clock)
    made.train()
    steps(made, clock, 0.01, 5)
    calls: list[object] = []
    monkeypatch.setattr(os, "utime", lambda *a: calls.append(a))
    monkeypatch.setattr(os, "replace", lambda *a: calls.append(a))
    steps(made, clock, 0.01, 1000)
    assert 8 <= len(calls) <= 11


def test_other_ranks_and_a_disk_that_refuses_write_nothing(tmp_path: Path, clock: Clock) -> None:
    for made in (Pace(tmp_path, 1, is_main=False, clock=clock), Pace(tmp_path / "gone", 1, clock=clock)):
        made.train()
        steps(made, clock, 2.0, 3)
    assert list(tmp_path.iterdir()) == []
    assert pace.read(pace.file_of(tmp_path, 1)) is None


@pytest.mark.parametrize("text", ["", "{", '{"phase": 3}', "[]"])
def test_a_torn_file_says_nothing(tmp_path: Path, text: str) -> None:
    pace.file_of(tmp_path, 2).write_text(text)
    assert pace.read(pace.file_of(tmp_path, 2)) is None


@pytest.mark.parametrize(
    ("beat", "idle", "line", "late"),
    [
        (Beat("training", 0.8, 600.0), 43 * 60, "no step for 43 min, usually 0.8 s", True),
        (Beat("training", 0.8, 600.0), 50, "no step for 50 s, usually 0.8 s", False),
        (Beat("training", 45.0, 4500.0), 440, "no step for 7 min, usually 45 s", False),
        (Beat("probing", 0.8, 14400.0), 1500, "no progress while probing for 25 min, usually 0.8 s", True),
        (Beat("starting", 0.0, 3600.0), 400, "no progress while starting for 7 min", True),
    ],
)
def test_what_status_says(beat: Beat, idle: float, line: str, late: bool) -> None:
    assert beat.line(idle) == line
    assert beat.is_late(idle) is late
