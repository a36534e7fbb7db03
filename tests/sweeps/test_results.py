import csv
import io
from pathlib import Path

import pytest
from rich.console import Console

from cnnjepa.runs import RunResult, RunStatus
from sweeps import results
from sweeps.folder import Sweep, View
from sweeps.spec import ScaleName, build_trials
from sweeps.status import counts_line, sweep_status
from sweeps.watch import wide_console
from tests.sweeps.tiny_sweep import sweep

OBJECTIVE, LINEAR, KNN = "linear.holdout_top1", "linear.test_top1", "knn.test_top1"


@pytest.fixture
def view(tmp_path: Path) -> View:
    """Three settings, two seeds: all of 'depth 1'; one of 'depth 2' and a failure; one of 'pointwise' without k-NN, one not begun."""
    spec = sweep()
    trials = build_trials(spec, spec.paper, 2, "local", [])
    made = Sweep.of(spec, ScaleName.paper, trials, tmp_path)
    made.write()
    numbers = {
        ("depth 1", 42): {OBJECTIVE: 60.0, LINEAR: 61.0, KNN: 50.0},
        ("depth 1", 43): {OBJECTIVE: 62.0, LINEAR: 65.0, KNN: 51.0},
        ("depth 2", 42): {OBJECTIVE: 70.0, LINEAR: 71.0, KNN: 52.0},
        ("pointwise", 42): {OBJECTIVE: 40.0, LINEAR: 41.0},
    }
    for trial in trials:
        folder = made.run(trial)
        metrics = numbers.get((trial.setting, trial.seed))
        if metrics:
            missing = {} if KNN in metrics else {"knn": "ValueError: features are not finite"}
            result = RunResult(RunStatus.completed, metrics=metrics, missing=missing, parameters=1234, device_hours=0.5)
        elif trial.setting == "depth 2":
            result = RunResult(RunStatus.failed, "NonFiniteError: loss nan", device_hours=0.25)
        else:
            continue
        folder.prepare(trial.config)
        folder.write_result(result)
    return View(made)


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_summary_has_mean_std_and_n_best_first_and_counts_what_is_left_out(view: View) -> None:
    lines = table(results.summary_csv(view))
    assert [line["setting"] for line in lines] == ["depth 2", "depth 1", "pointwise"]
    two, one, pointwise = lines
    assert float(one[f"{LINEAR}_mean"]) == 63
    assert float(one[f"{LINEAR}_std"]) == pytest.approx(8**0.5)
    assert one[f"{LINEAR}_n"] == "2"
    assert (two[f"{LINEAR}_mean"], two[f"{LINEAR}_std"], two[f"{LINEAR}_n"], two["failed"]) == ("71.0", "", "1", "1")
    assert (pointwise[f"{KNN}_mean"], pointwise[f"{KNN}_n"], pointwise["unfinished"]) == ("", "0", "1")
    assert float(two["device_hours"]) == 0.75  # what a failed run cost is not forgotten
    assert one[f"{LINEAR}_paper"] == "64.86"
    assert pointwise[f"{LINEAR}_paper"] == ""


def test_results_have_one_line_a_run_and_a_missing_value_is_empty_with_its_cause(view: View) -> None:
    lines = table(results.results_csv(view))
    assert len(lines) == 6
    by = {(line["setting"], line["seed"]): line for line in lines}
    assert by["depth 2", "43"]["state"] == "failed"
    assert by["depth 2", "43"][LINEAR] == ""
    assert by["depth 2", "43"]["cause"] == "NonFiniteError: loss nan"
    assert by["pointwise", "42"][KNN] == ""
    assert by["pointwise", "42"]["cause"] == "knn: ValueError: features are not finite"
    assert by["pointwise", "43"]["state"] == "waiting"


def test_the_terminal_table_shows_the_papers_value_beside_ours(view: View) -> None:
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(results.terminal_table(view))
    text = console.export_text()
    assert text.index("depth 2") < text.index("depth 1") < text.index("pointwise")
    assert "63.0 ± 2.8" in text
    assert "paper: linear top-1, test" in text
    assert "73.22" in text
    assert "1 (1 failed)" in text
    assert "1 (1 to come)" in text
    assert results.markdown_table(view).count("\n") == 5


def test_the_picture_is_drawn_also_with_gaps_and_with_nothing(view: View, tmp_path: Path) -> None:
    for path in results.write_all(view):
        assert path.stat().st_size > 100
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    spec = sweep()
    empty = Sweep.of(spec, ScaleName.smoke, build_trials(spec, spec.smoke, 1, "local", []), tmp_path / "empty")
    empty.write()
    results.write_all(View(empty))


def test_views_are_the_same_bytes_when_rebuilt(view: View, tmp_path: Path) -> None:
    first = [p.read_bytes() for p in results.write_all(view)]
    assert [p.read_bytes() for p in results.write_all(View(Sweep.load(tmp_path)))] == first


def test_status_counts_by_state(view: View) -> None:
    status = sweep_status(view)
    assert status["counts"] == {
        "waiting": 1,
        "running": 0,
        "requeued": 0,
        "interrupted": 0,
        "cancelled": 0,
        "completed": 4,
        "pruned": 0,
        "failed": 1,
    }
    assert counts_line(status) == "1 failed, 4 completed, 1 waiting of 6 trials"


def test_brackets_in_a_cause_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    wide_console().print("RuntimeError: [/a/pair.cc:561] closed")
    assert "[/a/pair.cc:561] closed" in capsys.readouterr().out
