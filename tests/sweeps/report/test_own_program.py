"""Reports of other trainers than CNN-JEPA: their words, their numbers, and what their runs count."""

import dataclasses
from pathlib import Path
from typing import Any

from cnnjepa.run.folder import RunResult, RunStatus
from jobs.plain import PlainTask
from sweeps.report import html_text
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


def made(path: Path, task: PlainTask, scores: tuple[float, ...] = ()) -> View:
    """A sweep of two configurations with one seed; those with a score have completed."""
    scale, two = Scale([], seeds=1), [Configuration({"lr": 0.1}), Configuration({"lr": 0.2})]
    spec = SweepSpec(name="own", question="", configurations=two, smoke=scale, paper=scale, task=task).resolved()
    found = Sweep.of(spec, ScaleName.paper, build_trials(spec, spec.paper, 1, "local", []), path)
    found.write()
    for trial, score in zip(found.trials, scores, strict=False):
        run = found.run(trial)
        run.prepare(trial.config)
        run.write_result(RunResult(RunStatus.completed, metrics={"loss": score}, step=3, device_hours=0.5, seconds=1800.0))
    return View(found)


def test_only_a_task_that_says_so_is_ranked_on_held_out_labels(tmp_path: Path) -> None:
    said = "Ranked on held-out training labels; the test split was read once, at the end of each run."
    assert said in html_text.beside_the_answer(ours(tmp_path / "ours", CLEAR))
    view = made(tmp_path / "own", EPOCHS, (0.02, 0.03))
    assert not [line for line in html_text.beside_the_answer(view) if "anked" in line or "split" in line]
