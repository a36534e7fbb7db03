"""The comparison of methods: its configurations can be trained at both scales, its table and picture hold costs and published values."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cnnjepa.config import method_names
from cnnjepa.rules import validate
from cnnjepa.run.folder import RunResult, RunStatus
from sweeps.method_comparison import SWEEP
from sweeps.report import aggregate, plots, tables
from sweeps.spec.sweep import ScaleName, build_trials
from sweeps.state.folder import Sweep
from sweeps.state.view import View


def trials_at(scale: ScaleName, seeds: int = 1) -> list:
    cluster = "local" if scale is ScaleName.smoke else "komondor"
    overrides = [] if scale is ScaleName.smoke else ["cluster.account=abc"]
    return build_trials(SWEEP, SWEEP.scale(scale), seeds, cluster, overrides)


def test_smoke_scale_has_one_row_a_method() -> None:
    trials = trials_at(ScaleName.smoke)
    assert sorted(t.values["method"]["name"] for t in trials) == method_names()
    assert len(trials) == 9
    assert {t.values["data"]["name"] for t in trials} == {"digits"}
    assert len({str(t.values["probes"]) for t in trials}) == 1  # all are judged alike


def test_paper_scale_is_what_was_published() -> None:
    values = {t.label: t.values for t in trials_at(ScaleName.paper)}
    assert all(v["data"]["name"] == "imagenet100_kaggle" and v["precision"] == "bf16" for v in values.values())
    reported = {
        name: (v["optimizer"]["name"], v["optimizer"]["lr"], v["encoder"]["sync_bn"], v["global_batch_size"], v["epochs"])
        for name, v in values.items()
    }
    assert reported["CNN-JEPA"] == ("adamw", 0.01, False, 512, 201)
    assert reported["SimCLR"] == ("lars", 1.7, True, 512, 201)
    assert reported["BYOL"] == ("adamw", 0.01, True, 512, 201)
    assert reported["VICReg"] == ("lars", 0.5, True, 512, 201)
    assert reported["I-JEPA, vit_small"] == ("adamw", 0.001, False, 2048, 300)
    assert reported["SparK"] == ("lamb", 0.0004, True, 512, 201)
    assert reported["LeJEPA"] == ("adamw", 0.0005, True, 512, 201)
    assert {values[f"I-JEPA, vit_{s}"]["encoder"]["name"] for s in ("small", "base")} == {"vit_small", "vit_base"}
    for trial in trials_at(ScaleName.paper):
        validate(trial.config, 4)


def finished(scale: ScaleName, path: Path) -> View:
    """Two seeds of every configuration with made results, of SimCLR one seed alone."""
    sweep = Sweep.of(SWEEP, scale, trials_at(scale, seeds=2), path)
    sweep.write()
    for i, trial in enumerate(sweep.trials):
        if trial.label == "SimCLR" and trial.seed == 43:
            continue
        probes = {f"{probe}.{part}": 50.0 + i for probe in ("linear", "knn") for part in ("holdout_top1", "test_top1", "test_top5")}
        batch = trial.values["global_batch_size"]
        costs = {"seconds": 200.0, "device_hours": 2.0, "images_per_second": batch * 10 / 100.0, "peak_memory_mb": 900.0}
        result = RunResult(RunStatus.completed, metrics={**probes, "linear.paper_protocol_top1": 60.0}, step=10, **costs)  # type: ignore[arg-type]
        result.energy_kwh = None if trial.label == "random" else 1.5
        sweep.run(trial).prepare(trial.config)
        sweep.run(trial).write_result(result)
    return View(sweep)


def test_costs_have_mean_spread_and_n_and_a_value_that_nobody_recorded_is_missing(tmp_path: Path) -> None:
    view = finished(ScaleName.smoke, tmp_path)
    lines = {line["setting"]: line for line in csv.DictReader(io.StringIO(tables.summary_csv(view)))}
    assert float(lines["BYOL"]["pretraining_hours_mean"]) == pytest.approx(1.0)  # 100 of the 200 seconds were training
    assert (lines["BYOL"]["energy_kwh_mean"], lines["BYOL"]["energy_kwh_n"]) == ("1.5", "2")
    assert (lines["random"]["energy_kwh_mean"], lines["random"]["energy_kwh_n"]) == ("", "0")
    assert lines["SimCLR"]["peak_memory_mb_n"] == "1"
    assert "linear.paper_protocol_top1_paper" not in lines["BYOL"]


def test_costs_are_shown_in_three_digits_or_whole() -> None:
    spreads = {(): "-", (0.0123,): "0.0123", (1234.5, 1230.5): "1,232 ± 2.8", (0.0, 0.0): "0 ± 0"}
    spreads |= {(99.94,): "99.9", (100.0,): "100", (300.0, 100.0, 200.0): "200 ± 100", (98.0, 100.0, 102.0): "100 ± 2"}
    assert {values: aggregate.Spread.of(values).in_digits() for values in spreads} == spreads


def test_the_table_says_which_published_values_are_the_best_of_several_runs(tmp_path: Path) -> None:
    console = Console(record=True, width=600, file=io.StringIO())
    console.print(tables.terminal_table(finished(ScaleName.paper, tmp_path), 600))
    text = console.export_text()
    assert "73.26*" in text
    assert "* in the paper each score is the best of several runs" in text
    assert re.search(r"(?<![\d.])51\.50(?![\d*])", text)  # hours are no score
    assert "51.50*" not in text
    assert "images/s" in text
    assert "peak memory, MiB" in text


@pytest.mark.slow
@pytest.mark.parametrize("scale", list(ScaleName), ids=lambda s: s.name)
def test_the_picture_of_costs_is_drawn_and_the_same_bytes_when_rebuilt(scale: ScaleName, tmp_path: Path) -> None:
    view = finished(scale, tmp_path)
    assert "accuracy_against_cost.png" in [p.name for p in tables.write_all(view)]
    first = (tmp_path / "accuracy_against_cost.png").read_bytes()
    assert len(first) > 5000
    tables.write_all(View(Sweep.load(tmp_path)))
    assert (tmp_path / "accuracy_against_cost.png").read_bytes() == first


def test_the_picture_of_costs_has_hours_across_scores_up_and_published_values_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, drawn = finished(ScaleName.paper, tmp_path), list[Any]()
    monkeypatch.setattr(plots, "_write_figure", lambda figure, path: drawn.append(figure))
    plots.draw_costs(view, tmp_path / "x.png")
    axis = drawn[0].axes[1]  # k-NN; the paper's linear scores are by another protocol
    byol = {s.label: s for s in aggregate.summaries(view)}["BYOL"]
    hours, score = byol.costs["pretraining_hours"], byol.spreads["knn.test_top1"]
    color = next(text.get_color() for text in axis.texts if text.get_text() == "BYOL")
    (bars,) = (c for c in axis.containers if c.lines[0].get_color() == color)
    across, up = (line.get_segments()[0] for line in bars.lines[2])
    assert (bars.lines[0].get_xdata()[0], bars.lines[0].get_ydata()[0]) == (hours.mean, score.mean)
    assert score.std is not None
    assert score.std > 1
    assert (across[1, 0] - across[0, 0], up[1, 1] - up[0, 1]) == pytest.approx((2 * (hours.std or 0.0), 2 * score.std))
    (published,) = (line for line in axis.lines if line.get_marker() == "D" and line.get_color() == color)
    assert (published.get_xdata()[0], published.get_ydata()[0]) == (79.3, 68.20)
    assert "BYOL, paper*" in [text.get_text() for text in axis.texts]
    assert "* each the best of several runs" in drawn[0].get_suptitle()
