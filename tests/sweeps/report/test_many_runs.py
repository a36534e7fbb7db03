"""A sweep of many configurations: what is drawn has a sane size, says what is left out, and merges nothing."""

import dataclasses
from pathlib import Path

import pytest
from PIL import Image

from cnnjepa.run.folder import RunResult, RunStatus
from cnnjepa.run.identity import from_dict, signature
from sweeps.report import html, plots, tables
from sweeps.report.aggregate import distinct, references, summaries
from sweeps.report.html_figures import colours, costs_figure, numeric_axis, scores_figure
from sweeps.report.html_text import hours_of_a_run
from sweeps.report.optuna_study import study_of
from sweeps.spec.space import applied
from sweeps.spec.sweep import Configuration, Trial
from sweeps.state.view import View
from tests.support.reported import OBJECTIVE, embedded, failed, made
from tests.support.watched import text_of

MANY = 120


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> View:
    """Configurations without an axis of numbers, the later the better."""
    first = made(tmp_path_factory.mktemp("many") / "many", {}, seeds=1)
    values = first.sweep.trials[0].values
    trials = []
    for number in range(MANY):
        own = applied(values, {"optimizer.lr": 0.001 * (1 + number), "method.predictor.depth": 1 + number % 3}, 42)
        trials.append(Trial(number, f"configuration {number}", 42, own, signature(from_dict(own))))
    sweep = dataclasses.replace(first.sweep, trials=trials, paper={})
    sweep.write()
    for trial in trials:
        run = sweep.run(trial)
        run.prepare(trial.config)
        run.open_metrics(0)
        run.record("step", 1, {"epoch": 1.0, "loss": 1.0})
        run.close()
        run.write_result(RunResult(RunStatus.completed, metrics={OBJECTIVE: 50 + trial.number / 10}, device_hours=0.5))
    return View(sweep)


def test_the_page_draws_the_best_and_says_so(many: View) -> None:
    page = html.build(many)
    data = embedded(page)
    assert "the 40 best of 120 configurations are drawn; summary.csv has all" in page
    assert "shown: 100 best of 120 configurations; summary.csv has all" in page
    assert [len(trace["y"]) for trace in data["figures"]["scores-0"]["data"]] == [40, 40]
    assert len(data["figures"]["costs"]["data"]) == 2, "one trace for all, and the front"
    assert len(data["trials"]) == MANY
    assert data["best_first"][0] == MANY - 1
    assert "100 of 120 curves at most" in " ".join(page.split())


@pytest.mark.slow
def test_the_picture_has_a_sane_size_and_says_what_it_shows(many: View, tmp_path: Path) -> None:
    plots.draw(many, tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as image:
        assert image.height < 3000


@pytest.mark.slow
def test_the_terminal_shows_the_best_and_all_where_asked(many: View) -> None:
    short, whole = tables.terminal_table(many, 100), tables.terminal_table(many, 100, None)
    assert (short.row_count, whole.row_count) == (50, MANY)
    assert "shown: 50 best of 120 configurations; summary.csv has all" in str(short.caption)
    assert "shown:" not in str(whole.caption)
    assert len(tables.markdown_table(many).splitlines()) > MANY


def test_a_board_counts_the_failed_runs_that_it_leaves_out(tmp_path: Path) -> None:
    view = made(tmp_path, {}, [Configuration({"optimizer.lr": 0.001 * i}) for i in range(1, 46)], seeds=1)
    for number in range(45):
        failed(view, number, "why")
    text = text_of(View(view.sweep), 160)
    assert text.count(": why") == 40
    assert "5 more failed; python -m sweeps status" in text


def test_configurations_of_one_label_are_never_merged(tmp_path: Path) -> None:
    first = made(tmp_path, {"depth 1": [50.0, 51.0], "depth 2": [60.0, 61.0], "pointwise": [70.0, 71.0]}, seeds=2).sweep
    same = dataclasses.replace(first, trials=[dataclasses.replace(t, label="same") for t in first.trials], paper={})
    view = View(same)
    table = summaries(view)
    assert [s.spreads[OBJECTIVE].mean for s in table] == [70.5, 60.5, 50.5]
    assert [s.spreads[OBJECTIVE].n for s in table] == [2, 2, 2]
    hues = colours(table)
    assert len(set(hues.values())) == 3
    assert {y for trace in scores_figure(view, table, OBJECTIVE, hues).data for y in trace.y} == {"same", "same (2)", "same (3)"}
    assert len(costs_figure(view, table, hours_of_a_run(view), "core-hours", hues).data[0].x) == 3
    assert len({t.params["setting"] for t in study_of(view).trials}) == 3
    assert len(tables.peoples_table(view).lines) == 3
    assert "of 3 configurations" in tables.markdown_table(view)
    assert not references(view)
    html.build(view)


def test_repeated_names_are_numbered() -> None:
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


def test_configurations_that_differ_in_their_epochs_too_are_no_line(tmp_path: Path) -> None:
    configurations = [Configuration({"method.predictor.depth": d, "epochs": e}) for d, e in ((1, 3), (2, 3), (1, 4), (2, 4))]
    assert numeric_axis(made(tmp_path / "both", {}, configurations, seeds=1)) is None
    assert numeric_axis(
        made(tmp_path / "one", {}, [*configurations[:2], Configuration({"method.predictor.depth": 3, "epochs": 3})], seeds=1)
    )
