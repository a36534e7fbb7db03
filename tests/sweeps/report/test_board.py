"""What a person sees of a sweep at a glance: what is best, whether that is real, what runs, what is stuck, and when it ends."""

import dataclasses
import re
import time
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from cnnjepa.run.folder import RunResult, RunStatus
from sweeps.report import board
from sweeps.report.best import score_of_best
from sweeps.report.board import Board, duration, left_line
from sweeps.report.standing import Standing, standing
from sweeps.report.status import sweep_status
from sweeps.spec.sweep import Configuration
from sweeps.state.view import View
from tests.support.reported import ALIKE, CLEAR, failed, made
from tests.support.watched import begun, running, text_of


@pytest.fixture(scope="module")
def under_way(tmp_path_factory: pytest.TempPathFactory) -> View:
    """Six trials of nine have a score, one has failed, one trains and one probes."""
    view = made(tmp_path_factory.mktemp("board") / "tiny_sweep-paper", {name: scores[:2] for name, scores in CLEAR.items()})
    failed(view, 8, "ValueError: loss is not finite at step 3")
    running(view, 6, 1.0, probe=41.5)
    running(view, 7, 1.5, phase="probing", silent=31)
    return View(view.sweep)


def test_a_glance_answers_what_is_best_whether_it_is_real_what_runs_and_what_has_failed(under_way: View) -> None:
    shown = " ".join(text_of(under_way, 160).split())
    lead = standing(under_way).leader
    assert lead is not None
    best = score_of_best(under_way, lead)
    assert "95 % interval" in best
    assert "tiny_sweep (paper): 1 failed, 6 completed, 2 running of 9 trials" in shown
    assert f"best depth 2: {best} by linear.holdout_top1; significantly better than all others (p" in shown, "the number of every table"
    assert "baseline depth 1: 60.5 ± 0.7 % (n = 2); the best is significantly better" in shown
    assert "now 1 training, 1 probing" in shown
    assert re.search(r"time about \d+ (s|min) left, until \d\d:\d\d", shown)
    assert "failed 08-pointwise-seed44: ValueError: loss is not finite at step 3" in shown
    assert re.search(r"06-depth1-seed44 training 1\.0/4 \d+ s 41\.5 \d+ (s|min) 1\.0000 812", shown)
    assert re.search(r"07-depth2-seed44 probing 1\.5/4 \d+ s", shown)


def test_completed_trials_stay_with_score_and_cost_the_best_first(under_way: View) -> None:
    lines = [line.split() for line in text_of(under_way, 160).splitlines()]
    completed = [line[:3] for line in lines if line and line[-1] != "…" and re.fullmatch(r"0\d-\w+-seed4[23]", line[0]) and len(line) > 3]
    assert [line[1:] for line in completed] == [[s, "0.5"] for s in ("76.0", "75.2", "61.0", "61.0", "60.2", "60.0")]
    assert completed[0][0] == "04-depth2-seed43"
    assert any(line[0] == "04-depth2-seed43" and "best" in line for line in lines if line)
    assert any(line[0] == "03-depth1-seed43" and "baseline" in line for line in lines if line)


def test_what_is_not_certain_is_not_called_certain(tmp_path: Path) -> None:
    tied = standing(made(tmp_path / "tied", ALIKE))
    assert re.fullmatch(
        r"depth 2: [0-9.]+ % \(95 % interval [0-9. to]+\) by linear\.holdout_top1; tied: 2 of 3 may be the best \(p = [0-9.]+\)", tied.best
    )
    assert tied.baseline.endswith("; the best is tied with it")
    single = standing(made(tmp_path / "single", {"depth 1": [60.0], "depth 2": [70.0]}))
    assert single.best == "depth 2: 70.0 % (n = 1) by linear.holdout_top1; not tested: that needs two seeds of it"
    assert single.baseline == "depth 1: 60.0 % (n = 1); the best is not tested against it"
    first = standing(made(tmp_path / "first", {"depth 1": [60.0]}))
    assert first.best == "depth 1: 60.0 % (n = 1) by linear.holdout_top1; no other has a score yet"
    assert first.baseline == "depth 1: it is the best so far"
    assert standing(made(tmp_path / "none", {})).best == ""


def test_a_trial_that_may_be_stuck_comes_first_and_says_why(tmp_path: Path) -> None:
    view = made(tmp_path, {"depth 1": [60.0]})
    running(view, 1, 1.0)
    running(view, 2, 0.5, silent=43 * 60, ago=3000)
    lines = text_of(View(view.sweep), 100).splitlines()
    assert any(line.startswith("stuck") and "02-pointwise-seed42: no step for 43 min, usually 0.8 s" in line for line in lines)
    rows = [line for line in lines if "training" in line and "seed" in line]
    assert [row.split()[0] for row in rows] == ["02-pointwise-seed42", "01-depth2-seed42"]


@pytest.mark.parametrize(("width", "height"), [(60, 24), (80, 16), (80, 23), (80, 40), (160, 16), (160, 40)])
def test_the_board_fits_the_terminal_and_says_what_is_left_out(width: int, height: int, under_way: View) -> None:
    warnings = tuple(f"warning: depth {i}, seed 42: its features are collapsing" for i in range(8))
    text = text_of(under_way, width, height, warnings)
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert len(lines) <= height
    said = " ".join(text.split())
    hidden = 6 - len(re.findall(r"0\d-\w+-seed4[23] +\d", text))
    assert (f"{hidden} {'more ' * (hidden < 6)}completed; python -m sweeps results" in said) == (hidden > 0)
    assert "shows all" in said if hidden else True
    left_out = 8 - said.count("warning: depth")
    assert (f"{left_out} more lines; python -m sweeps status" in said) == (left_out > 0)
    assert "seed44: ValueError" in said, "a failure is the last thing to give way"


def test_a_thousand_trials_take_a_screen(tmp_path: Path) -> None:
    view = made(tmp_path, {}, [Configuration({"optimizer.lr": 0.001})], seeds=1)
    one = sweep_status(view)["trials"][0]
    done = [{**one, "number": i, "name": f"{i:02d}-x", "state": "completed", "objective": float(i)} for i in range(900)]
    active = [{**one, "number": i, "name": f"{i:02d}-x", "state": "running", "done": 0.5} for i in range(900, 1000)]
    status = {**sweep_status(view), "trials": [*done, *active]}
    shown = Board(status, Standing("", ""), tmp_path)
    console = Console(width=100, height=40)
    began = time.perf_counter()
    lines = ["".join(piece.text for piece in line) for line in console.render_lines(shown.fitted(console, 39))]
    assert time.perf_counter() - began < 2
    said = " ".join(" ".join(lines).split())
    assert len(lines) <= 39
    assert "completed; python -m sweeps results" in said
    assert re.search(r"\d+ more not ended; python -m sweeps status .* --json has all", said)
    assert len(console.render_lines(shown.fitted(console))) < 110


def test_columns_give_way_before_names_do(under_way: View) -> None:
    narrow = text_of(under_way, 60)
    assert "07-depth2-seed44" in narrow
    assert "not in this width: " in narrow
    assert "images/s" in narrow.split("not in this width: ")[1]


def test_a_label_in_chinese_is_shown_and_keeps_columns_in_their_places(tmp_path: Path) -> None:
    first = made(tmp_path, {"depth 1": [60.0], "depth 2": [70.0]}, seeds=1).sweep
    labels = ["学习率很高的配置", "depth 2", "pointwise"]
    view = View(dataclasses.replace(first, trials=[dataclasses.replace(t, label=n) for t, n in zip(first.trials, labels, strict=True)]))
    lines = text_of(view, 80).splitlines()
    rows = [line for line in lines if "seed" in line and "0.5" in line]
    assert any("00 学习率很高的配置, seed 42" in row for row in rows)
    places = {cell_len(row[: re.search(r"[67]0\.0", row).end()]) for row in rows}  # type: ignore[union-attr]
    assert len(places) == 1


def test_a_pipe_gets_no_colours_and_a_terminal_without_them_neither(under_way: View, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in text_of(under_way)
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = text_of(under_way, force_terminal=True)
    assert "\x1b[31m" in coloured, "a failure is red"
    monkeypatch.setenv("NO_COLOR", "1")
    plain = text_of(under_way, force_terminal=True)
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain)


def test_what_a_command_does_is_said_and_what_holds_everything_up(tmp_path: Path) -> None:
    view = made(tmp_path, {"depth 1": [60.0]})
    assert "now      no trial runs, 8 wait" in text_of(view)
    assert "now      starting Ray" in text_of(view, phase="starting Ray")
    begun(view, 1)
    assert "now      1 running" in text_of(View(view.sweep))


def test_a_completed_trial_without_a_score_is_there(tmp_path: Path) -> None:
    view = made(tmp_path, {"depth 1": [60.0]})
    run = view.sweep.run(view.sweep.trials[1])
    run.prepare(view.sweep.trials[1].config)
    run.write_result(RunResult(RunStatus.completed, missing={"linear": "ValueError: x"}))
    assert re.search(r"01-depth2-seed42 +none", text_of(View(view.sweep)))


def test_times_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [duration(s) for s in (0.4, 99, 100, 3600, 3 * 3600, 3 * 86400)] == ["0 s", "99 s", "2 min", "60 min", "3.0 h", "3.0 d"]
    monkeypatch.setattr(board.time, "localtime", time.gmtime)
    assert left_line(840, 0) == "about 14 min left, until 00:14"
    assert left_line(30 * 3600, 0) == "about 30.0 h left, until Fri 06:00"
    assert left_line(None) == ""
