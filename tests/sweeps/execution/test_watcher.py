"""What a command prints while a sweep runs: the board on a terminal, and in a file a line for each change."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from cnnjepa.run.folder import RunResult, RunStatus
from sweeps.execution import phases, watcher
from sweeps.execution.watcher import Watcher
from sweeps.state.view import View
from tests.support.reported import OBJECTIVE, failed, made
from tests.support.watched import beat, begun, running

STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")


@pytest.fixture
def view(tmp_path: Path) -> View:
    return View(made(tmp_path / "tiny_sweep-paper", {"depth 1": [60.0, 61.0], "depth 2": [70.0]}, seeds=2).sweep)


def completes(view: View, number: int, score: float) -> None:
    trial = view.sweep.trials[number]
    run = view.sweep.run(trial)
    run.prepare(trial.config)
    run.write_result(RunResult(RunStatus.completed, metrics={OBJECTIVE: score}, claim=1, device_hours=0.25))


def printed(console: Console) -> list[str]:
    """The lines since the last call, without their times, which each of them has."""
    out = console.file
    lines = out.getvalue().splitlines()  # type: ignore[attr-defined]
    out.truncate(0)
    out.seek(0)
    assert all(STAMP.match(line) for line in lines), lines
    return [STAMP.sub("", line) for line in lines]


def without_times(line: str) -> str:
    """A line of which what depends on the clock is cut."""
    return re.sub(r"; about .*? left, until [\w :]+\d\d", "", line)


def test_a_file_gets_a_line_for_each_change_with_time_score_and_the_best(view: View) -> None:
    console = Console(file=io.StringIO(), width=400)
    with Watcher(view, console) as watch:
        watch.enter("starting Ray")
        assert printed(console) == ["starting Ray"]
        watch.show()
        (first,) = printed(console)
        assert first.startswith("3 completed, 3 waiting of 6 trials; best so far: depth 2: 70.0 % (n = 1)")
        watch.show()
        assert printed(console) == []
        folder = running(view, 4, 1.0)
        begun(view, 2)
        watch.show()
        assert [without_times(line) for line in printed(console)] == [
            "02-pointwise-seed42 running; 3 of 6 ended",
            "04-depth2-seed43 running; 3 of 6 ended",
        ]
        running_on = (folder / "metrics.jsonl").read_text()
        (folder / "metrics.jsonl").write_text(running_on + f'{{"kind": "probe", "step": 10, "epoch": 1.0, "{OBJECTIVE}": 44.25}}\n')
        watch.show()
        assert [without_times(line) for line in printed(console)] == ["04-depth2-seed43 probed: 44.2 % after 25 %; 3 of 6 ended"]
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(f'{{"kind": "probe", "step": 11, "epoch": 1.0, "{OBJECTIVE}": 45.0}}\n')
        watch.show()
        assert printed(console) == [], "a trial that reports at each step does not fill the file"
        completes(view, 4, 71.0)
        failed(view, 2, "ValueError: no")
        watch.show()
        gone, done = printed(console)
        assert without_times(gone).startswith("02-pointwise-seed42 failed: ValueError: no; 5 of 6 ended")
        assert re.match(
            r"04-depth2-seed43 completed: 71\.0 %, 0\.25 device-hours, took \d+ (s|min); best so far: depth 2: 70\.5 % \(n = 2\)", done
        )
        assert "; 5 of 6 ended" in done


def test_what_may_be_stuck_is_said_once(view: View) -> None:
    console = Console(file=io.StringIO(), width=400)
    with Watcher(view, console) as watch:
        watch.show()
        folder = running(view, 2, 1.0)
        watch.show()
        beat(folder, silent=43 * 60, began=1.0)
        printed(console)
        watch.show()
        watch.show()
        (line,) = printed(console)
        assert line.startswith("02-pointwise-seed42 may be stuck: no step for 43 min, usually 0.8 s")


def test_a_warning_is_said_once_and_a_quiet_sweep_says_how_far_it_is(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "warning_lines", lambda view, status: ["warning: x"])
    console = Console(file=io.StringIO(), width=400)
    running(view, 2, 1.0)
    with Watcher(view, console) as watch:
        watch.show()
        watch.show()
        assert [line for line in printed(console) if "warning" in line] == ["warning: x"]
        watch._printed -= 601
        watch.show()
        watch.show()
        (line,) = printed(console)
        assert line.startswith("running: 02-pointwise-seed42 25 %; about ")


def test_a_terminal_shows_the_board_and_keeps_completed_trials(view: View) -> None:
    console = Console(file=io.StringIO(), width=100, height=30, force_terminal=True, _environ={"TERM": "xterm"})
    with Watcher(view, console) as watch:
        watch.enter("starting Ray")
        watch.show()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]
    assert "now      starting Ray" in text
    assert re.search(r"time +this command has run for 0 s", text)
    assert re.search(r"01-depth2-seed42 +70\.0 +0\.5", text)


def test_who_leads_is_judged_again_only_when_a_score_has_come(view: View, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []
    real = watcher.standing
    monkeypatch.setattr(watcher, "standing", lambda view: judged.append(1) or real(view))
    with Watcher(view, Console(file=io.StringIO())) as watch:
        watch.show()
        watch.show()
        assert len(judged) == 1
        completes(view, 4, 71.0)
        watch.show()
        assert len(judged) == 2


def test_a_command_that_stops_says_for_what_it_waits_and_how_long_at_most(view: View) -> None:
    assert phases.saving(View(view.sweep)) == "stopping the workers"
    running(view, 2, 1.0)
    assert phases.saving(View(view.sweep)) == "saving 1 trial, up to 61 s"
    running(view, 4, 1.0, phase="probing")
    assert phases.saving(View(view.sweep)) == "saving 2 trials, of which 1 still probing"
