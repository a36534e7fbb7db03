"""Tables have a column per hyperparameter, what varies first, and the number, name and run ID of each trial."""

import csv
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import pytest

from cnnjepa.run.folder import RunResult, RunStatus
from jobs.plain import PlainTask
from sweeps.cli.api import Sweep as Opened
from sweeps.report import html, one_trial, tables
from sweeps.report.status import in_full
from sweeps.spec import hyperparameters
from sweeps.spec.sweep import Configuration, Scale, ScaleName, SweepSpec, build_trials
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.reported import CLEAR, embedded, made
from tests.support.searched import run_to_the_end, searched

DEPTH, CONV = "method.predictor.depth", "method.predictor.conv"


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    return made(tmp_path_factory.mktemp("sweep"), CLEAR, seeds=2)


def test_results_csv_has_a_column_per_hyperparameter_what_varies_first(view: View) -> None:
    lines = table(tables.results_csv(view))
    first = list(lines[0])
    assert first[:8] == ["signature", "setting", "seed", "state", "number", "name", DEPTH, CONV]
    assert {"epochs", "encoder.width", "optimizer.warmup_epochs"} <= set(first[8:])  # the same in all trials, as the sweep gives them
    assert [(line[DEPTH], line[CONV], line["epochs"]) for line in lines[:3]] == [
        ("1", "depthwise", "4"),
        ("2", "depthwise", "4"),
        ("3", "pointwise", "4"),
    ]
    assert [line["name"] for line in lines[2:4]] == ["02-pointwise-seed42", "03-depth1-seed43"]
    assert [line["signature"] for line in lines] == [t.signature for t in view.sweep.trials]


def test_summary_csv_has_the_same_columns_and_names_the_trials(view: View) -> None:
    lines = table(tables.summary_csv(view))
    first = {line["setting"]: line for line in lines}
    assert list(lines[0])[:4] == ["setting", "trials", DEPTH, CONV]
    assert first["depth 2"]["trials"] == "01-depth2-seed42 04-depth2-seed43"
    assert (first["depth 2"][DEPTH], first["pointwise"][CONV]) == ("2", "pointwise")


def test_status_a_frame_and_a_page_have_them_too(view: View) -> None:
    shown = in_full(view)["trials"]
    assert [(t["number"], t["name"]) for t in shown][:2] == [(0, "00-depth1-seed42"), (1, "01-depth2-seed42")]
    assert list(shown[1]["hyperparameters"])[:2] == [DEPTH, CONV]
    assert [t["hyperparameters"][DEPTH] for t in shown[:3]] == [1, 2, 3]
    frame = Opened(view.sweep).to_frame()
    assert list(frame.columns)[:6] == ["run_id", "configuration", "seed", "state", "cause", DEPTH]
    assert list(frame.name)[:2] == ["00-depth1-seed42", "01-depth2-seed42"]
    assert list(frame.number) == list(range(6))
    assert [Opened(view.sweep).trial(name).name for name in (4, "4", "04-depth2-seed43", "depth 2/43")] == ["04-depth2-seed43"] * 4
    page = html.build(view)
    assert page.count(f">{DEPTH}</button></th>") == page.count(f">{CONV}</button></th>") == 2
    assert "<td>03-depth1-seed43</td><td>" + view.sweep.trials[3].signature in re.sub(r"\s*\n\s*", "", page)
    assert [(t["number"], t["name"]) for t in embedded(page)["trials"]][4] == (4, "04-depth2-seed43")


def test_tables_for_people_end_with_the_numbers_of_the_trials(view: View) -> None:
    text = tables.markdown_table(view)
    assert [line.rsplit("|", 2)[1].strip() for line in text.splitlines()[:5]] == ["trials", "---:", "1, 4", "2, 5", "0, 3"]


def test_in_a_search_the_space_varies_from_the_first_trial_on(tmp_path: Path) -> None:
    made = searched(tmp_path, max_trials=3)
    space = [d.key for d in made.search.space if d.key in dict(hyperparameters.leaves(made.trials[0].values))]  # type: ignore[union-attr]
    assert space
    assert hyperparameters.varying(made.trials, made.search)[: len(space)] == space
    run_to_the_end(made, lambda trial: 50.0)
    assert set(hyperparameters.varying(made.trials, made.search)) >= set(space)
    names = [line["name"] for line in table(tables.results_csv(View(made)))]
    assert [name[:3] for name in names] == ["00-", "01-", "02-"]


@dataclasses.dataclass
class Taken:
    name: str = "a"
    state: int = 0
    sizes: list[int] = dataclasses.field(default_factory=lambda: [1, 2])
    epochs: int = 4
    seed: int = 42


def _train(config: Any, run: Any) -> None:
    """Nothing trains here."""


TAKEN = PlainTask(Taken, _train, objective="loss", direction="minimize")


def test_a_key_that_another_column_has_is_told_apart(tmp_path: Path) -> None:
    scale = Scale([], seeds=1)
    spec = SweepSpec(
        name="own", question="", configurations=[Configuration({"state": 1}), Configuration({"name": "b"})], smoke=scale, task=TAKEN
    )
    spec = spec.resolved()
    found = Sweep.of(spec, ScaleName.smoke, build_trials(spec, scale, 1, "local", []), tmp_path)
    found.write()
    for trial in found.trials:
        found.run(trial).prepare(trial.config)
        found.run(trial).write_result(RunResult(RunStatus.completed, metrics={"loss": 1.0}))
    lines = table(tables.results_csv(View(found)))
    assert [(line["state"], line["config.state"], line["name"], line["config.name"]) for line in lines] == [
        ("completed", "1", "00-state1-seed42", "a"),
        ("completed", "0", "01-b-seed42", "b"),
    ]
    frame = Opened(found).to_frame()
    assert list(frame["config.state"]) == [1, 0]
    assert (list(frame["name"]), list(frame["trial.name"])) == (["a", "b"], ["00-state1-seed42", "01-b-seed42"])
    assert list(frame["sizes"]) == [[1, 2], [1, 2]]


def test_only_scores_are_percentages(tmp_path: Path) -> None:
    """A score rests on images; rank and iterations are numbers of their own."""
    view = made(tmp_path, {"depth 1": [60.0]}, seeds=1)
    trial = view.sweep.trials[0]
    metrics = {"linear.holdout_top1": 61.5, "linear.iterations": 24.0, "linear.relative_gradient": 0.00099, "collapse.rankme": 11.14}
    view.sweep.run(trial).set_aside(RunStatus.completed)
    view.sweep.run(trial).write_result(RunResult(RunStatus.completed, metrics=metrics, images={"linear.holdout_top1": 100}))
    again = View(view.sweep)
    shown = one_trial.lines(again, trial, one_trial.about(again, trial))
    assert [line.strip() for line in shown if " = " in line][:4] == [
        "collapse.rankme = 11.14",
        "linear.holdout_top1 = 61.50 %",
        "linear.iterations = 24",
        "linear.relative_gradient = 0.00099",
    ]
    assert f"  python -m jobs.export {tmp_path}/0" in shown
