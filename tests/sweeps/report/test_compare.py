"""Two sweeps beside each other: configurations matched by what they set, one error rate, and what differs in base and code."""

import dataclasses
import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from sweeps import __main__ as command
from sweeps.cli.plan import parse, plan
from sweeps.cli.side_by_side import in_words, show_list
from sweeps.execution.monitor import wide_console
from sweeps.report.compare import as_json, compared
from sweeps.report.listing import sweeps_in, table, to_go_on
from sweeps.report.significance import compare
from sweeps.report.winner import pairs
from sweeps.spec.sweep import Configuration, Scale, SweepSpec
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support.killed_run import configured, loaded

_TASK = """
import dataclasses
from sweeps import PlainTask

@dataclasses.dataclass
class Config:
    lr: float = 0.1
    width: int = 8
    kind: str = "a"
    note: str = dataclasses.field(default="", metadata={"neutral": True})
    seed: int = 42
    epochs: int = 2

def train(config, run):
    run.report(1, acc=1.0)

TASK = PlainTask(Config, train, objective="acc", unit="%")
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("own") / "compared_task.py"
    file.write_text(_TASK)
    return loaded(file).TASK


def spec_of(task: Any, configurations: Sequence[Mapping[str, Any]], name: str = "rates") -> SweepSpec:
    scale = Scale([], seeds=3)
    made, _ = configured(
        SweepSpec(name, "Which?", configurations=[Configuration(c) for c in configurations], smoke=scale, paper=scale, task=task)
    )
    return made


def scored(spec: SweepSpec, runs: Path, scores: Mapping[str, Sequence[float]], *words: str, commit: str = "a" * 40) -> View:
    """A sweep whose configurations have these scores, by label, one a seed; a label without scores has not begun."""
    sweep, _ = plan(spec, parse(spec, ["--runs-dir", str(runs), *words]))
    sweep.write()
    counts: dict[str, int] = {}
    for trial in sweep.trials:
        at = counts.get(trial.label, 0)
        counts[trial.label] = at + 1
        if at < len(scores.get(trial.label, [])):
            folder = RunFolder(sweep.trial_dir(trial))
            folder.prepare(trial.config)
            folder.write_result(RunResult(RunStatus.completed, metrics={"acc": scores[trial.label][at]}))
            about = {"commit": commit, "diff": "", "packages": {"torch": commit[0]}, "python": "3.11", "host": "h"}
            (folder.path / "provenance.json").write_text(json.dumps(about))
    line = {"command": ["python", "rates.py", *words], "commit": commit, "changed": False, "time": "t"}
    (sweep.path / "commands.jsonl").write_text(json.dumps(line) + "\n")
    return View(Sweep.load(sweep.path))


RATES = [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}]
LOW = {"lr 0.1": [60.0, 61.0, 62.0], "lr 0.2": [70.1, 71.0, 72.0], "lr 0.3": [65.0, 66.2]}
HIGH = {"lr 0.1": [70.2, 71.0, 72.1], "lr 0.2": [70.0, 71.2, 72.0], "lr 0.3": [66.0]}


def test_configurations_are_matched_by_what_they_set_and_the_base_is_told(task: Any, tmp_path: Path) -> None:
    first = scored(spec_of(task, RATES), tmp_path, LOW)
    second = scored(spec_of(task, [*reversed(RATES), {"lr": 0.5}]), tmp_path, HIGH, "epochs=9", "note=x", commit="b" * 40)
    found = compared(first, second)
    assert {p.first.summary.label: p.second.summary.label for p in found.pairs} == {label: label for label in LOW}
    assert found.varied == ["lr"]
    assert found.base == [("epochs", 2, 9)]
    assert [side.summary.label for side in found.only[1]] == ["lr 0.5"]
    assert found.code == ["commit: aaaaaaaaaaaa -> bbbbbbbbbbbb", "torch: a -> b"]
    by = {p.first.summary.label: p for p in found.pairs}
    assert [by[label].better for label in sorted(by)] == [2, 0, 0]
    assert by["lr 0.1"].comparison == compare(by["lr 0.1"].second.summary.values["acc"], by["lr 0.1"].first.summary.values["acc"])
    assert by["lr 0.3"].p is None  # one run
    table, lines = in_words(found, first, second, 80)
    text = "\n".join(lines)
    assert table.row_count == 3
    assert "matched by lr" in text
    assert "base: epochs: 2 -> 9" in text
    assert "only in the second: 1: lr 0.5 -" in text
    said = json.loads(json.dumps(as_json(found, first, second)))
    assert (said["matched_by"], said["base"]) == (["lr"], [{"key": "epochs", "first": 2, "second": 9}])
    assert [c["judged"]["higher"] for c in said["configurations"] if c["sets"] == {"lr": 0.1}] == ["second"]


def test_what_one_sweep_varies_matches_the_base_of_the_other(task: Any, tmp_path: Path) -> None:
    first = scored(spec_of(task, RATES), tmp_path, LOW)
    second = scored(spec_of(task, [{"width": 8}, {"width": 16}], "widths"), tmp_path, {"width 8": [1.0, 2.0, 3.0]}, "lr=0.2")
    found = compared(first, second)
    assert [(p.first.summary.label, p.second.summary.label) for p in found.pairs] == [("lr 0.2", "width 8")]
    assert found.base == []
    assert found.varied == ["lr", "width"]


def test_sweeps_without_a_common_metric_are_refused(task: Any, tmp_path: Path) -> None:
    first = scored(spec_of(task, RATES), tmp_path, LOW)
    other = scored(spec_of(task, RATES, "other"), tmp_path, {})
    changed = View(dataclasses.replace(first.sweep, objective="f1"))
    with pytest.raises(ValueError, match=r"other-smoke must have the metric f1, by which .*rates-smoke is ranked; got one ranked by acc$"):
        compared(changed, other)
    assert [p.comparison for p in compared(first, other).pairs] == [None] * 3


def test_copies_of_the_code_and_the_program_are_compared(task: Any, tmp_path: Path) -> None:
    views = [scored(spec_of(task, RATES, name), tmp_path, LOW) for name in ("one", "two")]
    for view, digest, text in zip(views, ("1" * 12, "2" * 12), ("x", "y")):
        copy = view.sweep.path / "code" / digest
        (copy / "jobs").mkdir(parents=True)
        (copy / "jobs" / "run.py").write_text(text)
        (copy / "jobs" / "cli.py").write_text("same")
        (copy / "code.json").write_text(text)
    program = json.loads((views[1].sweep.path / "program.json").read_text())
    program["files"] = dict.fromkeys(program["files"], "other")
    del program["sha256"]
    (views[1].sweep.path / "program.json").write_text(json.dumps(program))
    lines = compared(*views).code
    assert lines[0].startswith("the copies of the code differ in 1 file (jobs/run.py): diff -r ")
    assert lines[1] == "the program differs in 1 file (compared_task.py)"
    assert compared(views[0], scored(spec_of(task, RATES, "three"), tmp_path, LOW)).code == ["the code is the same"]


def test_all_differences_share_one_error_rate() -> None:
    """Of pairs of equal configurations, one is called different in at most 5 % of comparisons, and a clear difference is found."""
    draw, false, seen, rounds = random.Random(5), 0, 0, 60
    for _ in range(rounds):
        effect = [draw.gauss(0, 1) for _ in range(3)]
        sides = [{f"c{i}": {s: i * 2 + effect[s] + draw.gauss(0, 1) for s in range(3)} for i in range(6)} for _ in range(2)]
        false += any(p is not None and p < 0.05 for p in pairs(*sides).values())
        sides[1]["c0"] = {s: v + 6 for s, v in sides[1]["c0"].items()}
        seen += (pairs(*sides)["c0"] or 1.0) < 0.05
    assert false <= 7  # 3 expected; more in one of thousands of such tests
    assert seen >= 50


def test_few_runs_claim_little() -> None:
    draw = random.Random(6)
    false = sum((pairs(*({"c": {s: draw.gauss(0, 1) for s in range(2)}} for _ in range(2)))["c"] or 1.0) < 0.05 for _ in range(200))
    assert false <= 20
    assert pairs({"c": {1: 3.0}}, {"c": {1: 4.0}}) == {"c": None}
    assert pairs({"c": {1: 3.0, 2: 3.0}}, {"c": {1: 3.0, 2: 3.0}}) == {"c": None}


def test_the_list_has_a_line_a_sweep_and_the_command_that_goes_on(task: Any, tmp_path: Path) -> None:
    scored(spec_of(task, RATES, "done"), tmp_path, {label: [s + i for i, s in enumerate(LOW["lr 0.1"])] for label in LOW})
    scored(spec_of(task, RATES, "half"), tmp_path, LOW, "epochs=9")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sweep.json").write_text("{")
    (tmp_path / "single").mkdir()
    found = {f["name"]: f for f in sweeps_in(tmp_path)}
    assert found.keys() == {"done-smoke", "half-smoke-epochs9", "broken"}
    half, done = found["half-smoke-epochs9"], found["done-smoke"]
    assert half["counts"] == {"completed": 8, "waiting": 1}
    assert half["best_line"].startswith("71.0 % (95 % interval "), "the number of every table"
    assert (half["left"], done["left"]) == (True, False)
    assert "sweep.json" in found["broken"]["cause"]
    assert to_go_on(list(found.values())) == ["to go on with half-smoke-epochs9: python rates.py epochs=9"]
    runs = {**half, "counts": {"running": 2}}
    assert to_go_on([runs]) == ["to watch half-smoke-epochs9, which runs: python rates.py epochs=9"]
    for width in (80, 160):
        assert table(list(found.values()), tmp_path, width).row_count == 3
    assert json.loads(json.dumps(half))["best"]["setting"] == "lr 0.2"


def typed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["sweeps", *map(str, words)])
    status = command.main()
    return status, *capsys.readouterr()


def test_the_commands(task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (scored(spec_of(task, RATES, name), tmp_path, LOW).sweep.path for name in ("one", "two"))
    status, out, _ = typed(capsys, monkeypatch, "list", tmp_path, "--json")
    assert (status, {s["name"] for s in json.loads(out)["sweeps"]}) == (0, {"one-smoke", "two-smoke"})
    assert "one-smoke" in typed(capsys, monkeypatch, "list", tmp_path)[1]
    status, out, _ = typed(capsys, monkeypatch, "compare", first, second, "--json")
    assert (status, json.loads(out)["sweeps"]) == (0, [str(first), str(second)])
    assert "code: the code is the same" in typed(capsys, monkeypatch, "compare", first, second)[1]
    assert typed(capsys, monkeypatch, "compare", first, first)[::2] == (
        2,
        f"error: SECOND must be another sweep than FIRST; got {first} twice\n",
    )
    said = f"error: RUNS must be the folder of your sweeps; got {tmp_path / 'none'}: there is no such folder\n"
    assert typed(capsys, monkeypatch, "list", tmp_path / "none")[::2] == (2, said)
    assert typed(capsys, monkeypatch, "compare", first, tmp_path)[0] == 2
    (tmp_path / "empty").mkdir()
    assert show_list(tmp_path / "empty", False, wide_console()) == 0
    assert capsys.readouterr().out.split() == f"no sweep in {tmp_path / 'empty'}".split()
