"""Reports of other trainers than CNN-JEPA: their words, their numbers, and what their runs count."""

import argparse
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cnnjepa.run.folder import RunResult, RunStatus
from jobs.config import compose_job
from jobs.cost import combined, estimate
from jobs.plain import PlainTask
from sweeps.cli.run import show_plan
from sweeps.report import html, html_text, html_trials
from sweeps.report.aggregate import rows, summaries
from sweeps.report.board import Board
from sweeps.report.html_figures import colours, scores_figure
from sweeps.report.standing import Standing
from sweeps.report.status import rungs_line, sweep_status
from sweeps.report.tables import peoples_table
from sweeps.spec.sweep import Configuration, Scale, ScaleName, SweepSpec, build_trials
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.reported import CLEAR
from tests.support.reported import made as ours


@dataclasses.dataclass
class Epochs:
    lr: float = 0.1
    epochs: int = 4
    seed: int = 42


@dataclasses.dataclass
class Steps:
    lr: float = 0.1
    steps: int = 40
    seed: int = 42


@dataclasses.dataclass
class Unknown:
    lr: float = 0.1
    seed: int = 42


def _train(config: Any, run: Any) -> None:
    """Nothing trains here."""


EPOCHS = PlainTask(Epochs, _train, objective="loss", direction="minimize")
STEPS = PlainTask(Steps, _train, objective="loss", direction="minimize")
UNKNOWN = PlainTask(Unknown, _train, objective="loss", direction="minimize")


def made(path: Path, task: PlainTask, scores: tuple[float, ...] = (), rates: tuple[float, ...] = (0.1, 0.2)) -> View:
    """A sweep of a configuration per rate, with one seed; those with a score have completed."""
    scale, swept = Scale([], seeds=1), [Configuration({"lr": rate}) for rate in rates]
    spec = SweepSpec(name="own", question="", configurations=swept, smoke=scale, paper=scale, task=task).resolved()
    found = Sweep.of(spec, ScaleName.paper, build_trials(spec, spec.paper, 1, "local", []), path)
    found.write()
    for trial, score in zip(found.trials, scores, strict=False):
        run = found.run(trial)
        run.prepare(trial.config)
        run.write_result(RunResult(RunStatus.completed, metrics={"loss": score}, step=3, device_hours=0.5, seconds=1800.0))
    return View(found)


def board_of(status: dict[str, Any]) -> str:
    """What a terminal shows of the trials that run and have completed."""
    console = Console(file=io.StringIO(), width=160)
    console.print(Board(status, Standing("", ""), Path("runs")).fitted(console))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_only_a_task_that_says_so_is_ranked_on_held_out_labels(tmp_path: Path) -> None:
    said = "Ranked on held-out training labels; the test split was read once, at the end of each run."
    assert said in html_text.beside_the_answer(ours(tmp_path / "ours", CLEAR))
    view = made(tmp_path / "own", EPOCHS, (0.02, 0.03))
    assert not [line for line in html_text.beside_the_answer(view) if "anked" in line or "split" in line]


def test_small_scores_keep_their_digits_wherever_they_are_shown(tmp_path: Path) -> None:
    view = made(tmp_path, EPOCHS, (0.00234, 0.00245))
    view = View(dataclasses.replace(view.sweep, paper={view.sweep.trials[0].label: {"loss": 0.0021}}, headline=["loss"]))
    trial, table = view.sweep.trials[0], summaries(view)
    assert "loss: 0.00234" in html_text.about(view, trial, "core-hours")
    assert html_trials.cells(view, trial, rows(view)[0], ["loss"])[4] == "0.00234"
    assert peoples_table(view).lines[0][2].text == "0.0021"
    shown = str(scores_figure(view, table, "loss", colours(table)))
    assert (shown.count("x:.4g"), "paper: 0.0021," in shown) == (2, True)
    line = made(tmp_path / "line", EPOCHS, (0.00234, 0.00245, 0.0025), rates=(0.1, 0.2, 0.3))
    shown = str(scores_figure(line, summaries(line), "loss", {}))
    assert (shown.count("y:.4g"), ".2f" in shown) == (2, False)
    status = sweep_status(view)
    status["trials"][0] |= {"state": "running", "probe": 0.00234}
    assert " 0.00234 " in board_of(status)
    status["unit"] = "%"
    assert " 0.0 " in board_of(status)
    assert " 0.00234 " not in board_of(status)


def test_what_runs_count_is_said_everywhere(tmp_path: Path) -> None:
    def planned(view: View) -> str:
        console = Console(file=io.StringIO(), width=200)
        asked = argparse.Namespace(keep=False, rerun=False, dry_run=True, retry_failed=False)
        show_plan(view.sweep, asked, console)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    with_rungs = [
        View(dataclasses.replace(made(tmp_path / name, task).sweep, rungs=[2, 4], eta=3))
        for name, task in (("epochs", EPOCHS), ("steps", STEPS))
    ]
    for view, one, length in zip(with_rungs, ("epoch", "step"), (4, 40), strict=True):
        said = planned(view)
        assert f"2 trials, {length} {one}s each, in " in said
        assert f"after {one}s 2, 4 the best 1/3" in said
        assert rungs_line(view).startswith(f"rungs: {one} 2: 0 runs, {one} 4: 0 runs")
        status = sweep_status(view)
        status["trials"][0] |= {"state": "running", "epoch": 3.0}
        shown = " ".join(board_of(status).split())
        assert f" {one} last step " in shown
        assert shown.endswith(" 3.0/4" if one == "epoch" else " 3/40")
    assert '"one": "step"' in html.build(with_rungs[1])
    unknown = made(tmp_path / "unknown", UNKNOWN)
    assert "2 trials, in " in planned(unknown)
    varied = [dataclasses.replace(t, values={**t.values, "steps": 8 * (n + 1)}) for n, t in enumerate(with_rungs[1].sweep.trials)]
    view = View(dataclasses.replace(with_rungs[1].sweep, trials=varied))
    assert "of its steps each run is compared" in planned(view)
    assert "of a run's steps: 0 runs" in rungs_line(view)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (EPOCHS, ["cost estimate: 2 runs, 8 epochs to train x 0.5 core-hours per epoch = 4 core-hours", "  cost per epoch: measured"]),
        (STEPS, ["cost estimate: 2 runs, 80 steps to train x 0.5 core-hours per step = 40 core-hours", "  cost per step: measured"]),
        (UNKNOWN, ["cost estimate: 2 runs x 0.5 core-hours per run = 1 core-hours", "  cost per run: measured"]),
    ],
)
def test_a_cost_estimate_counts_what_runs_count(task: PlainTask, said: list[str], tmp_path: Path) -> None:
    trials = made(tmp_path, task).sweep.trials
    cluster = compose_job([]).cluster
    price = estimate(cluster, trials[0].values, [float(t.epochs) for t in trials], 1.0, [0.5])
    both = combined([price, price], cluster)
    assert [line[: len(text)] for line, text in zip(price.lines(), said, strict=False)] == said
    assert both.counted == price.counted
    assert " epoch" not in estimate(cluster, made(tmp_path / "u", UNKNOWN).sweep.trials[0].values, [1.0], 1.0, []).lines()[0]
