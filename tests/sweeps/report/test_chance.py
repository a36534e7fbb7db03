"""Scores within error of guessing: one function says so in the table, in status and on the page."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

from cnnjepa.references import CHANCE as OF_THE_TRAINER
from cnnjepa.run.folder import RunResult, RunStatus
from sweeps import __main__ as command_line
from sweeps.report import html, tables
from sweeps.report.chance import CHANCE, chance_lines
from sweeps.spec.sweep import ScaleName, build_trials
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.tiny_sweep import sweep

OBJECTIVE, LINEAR, KNN = "linear.holdout_top1", "linear.test_top1", "knn.test_top1"


def scored(path: Path, scores: list[float], images: int = 100, chance: float | None = 10.0) -> View:
    """Two seeds of three configurations with these scores of all metrics, in the sweep's order, on so many images."""
    spec = sweep()
    trials = build_trials(spec, spec.smoke, 2, "local", [])
    made = Sweep.of(spec, ScaleName.smoke, trials, path)
    made.write()
    for trial, score in zip(trials, scores, strict=True):
        folder = made.run(trial)
        folder.prepare(trial.config)
        metrics = dict.fromkeys((OBJECTIVE, LINEAR, KNN), score)
        references = {} if chance is None else {CHANCE: dict.fromkeys(metrics, chance)}
        folder.write_result(RunResult(RunStatus.completed, metrics=metrics, images=dict.fromkeys(metrics, images), references=references))
    return View(made)


def test_the_name_is_that_of_the_trainer() -> None:
    assert CHANCE == OF_THE_TRAINER


def test_what_is_within_two_errors_of_chance_is_named_in_the_table_in_status_and_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    view = scored(tmp_path, [9.4, 50.0, 17.0, 9.4, 50.0, 17.0])  # 100 images: 10 ± 3, so that 16.0 is the border
    line = (
        "within error of chance by linear top-1, held-out: depth 1, where guessing gets 10.0 ± 3.0 % of 100 images: "
        "their differences mean nothing; train for more epochs, or on more images"
    )
    lines = chance_lines(view)
    assert lines[0] == line
    assert len(lines) == 3, "each column of the table"
    assert line in tables.markdown_table(view)
    assert f"W{line[1:]}." in re.sub("</?b>", "", html.build(view))
    monkeypatch.setattr(sys, "argv", ["sweeps", "status", str(tmp_path)])
    assert command_line.main() == 0
    assert line in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["sweeps", "status", str(tmp_path), "--json"])
    assert command_line.main() == 0
    assert json.loads(capsys.readouterr().out)["chance"] == lines


def test_the_spread_over_seeds_counts_too(tmp_path: Path) -> None:
    # 17 is above 10 + 2 x 3; 5 and 29 have the mean 17 and the error 12.4.
    assert "pointwise, depth 1, where" in chance_lines(scored(tmp_path, [9.4, 50.0, 5.0, 9.4, 50.0, 29.0]))[0]


def test_all_and_many_images_and_none(tmp_path: Path) -> None:
    every = scored(tmp_path / "a", [9.4, 10.0, 11.0] * 2)
    assert "all configurations, where guessing gets 10.0 ± 3.0 %" in chance_lines(every)[0]
    assert chance_lines(scored(tmp_path / "b", [12.0, 13.0, 14.0] * 2, images=10_000)) == []


def test_a_task_without_classes_gets_no_warning(tmp_path: Path) -> None:
    view = scored(tmp_path, [1.0, 2.0, 3.0] * 2, chance=None)
    assert chance_lines(view) == []
    result = view.result(view.sweep.trials[0])
    assert result is not None
    assert dataclasses.replace(result).references == {}
