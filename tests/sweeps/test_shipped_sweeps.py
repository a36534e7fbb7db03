"""Each sweep that is shipped comes to its table, its pictures and its page, and every command that looks at a sweep reads it."""

import csv
import json
import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa.config import method_module, method_names
from jobs.task import task_of
from sweeps.execution import monitor
from sweeps.report import plots as pictures
from sweeps.spec.sweep import Configuration, SweepSpec
from tests.support import tiny_search, tiny_sweep
from tests.support.browser import opened
from tests.support.shipped import CAUSE, GONE, Text, Trainer, in_process, read, run, shipped

SHIPPED = shipped()


def test_all_sweeps_are_found() -> None:
    assert {"ema_momentum", "joint_search", "learning_rate", "mask_ratio", "method_comparison", "predictor_ablation"} <= SHIPPED.keys()


FORMATS = ("table", "csv", "markdown", "latex")


def expected_means(trainer: Trainer, configurations: dict[str, str], metric: str, left_out: set[str]) -> dict[str, float]:
    """Configuration -> mean of what was made up for its completed runs that have the metric."""
    found: dict[str, list[float]] = {}
    for signature in trainer.begun:
        if signature not in left_out:
            found.setdefault(configurations[signature], []).append(trainer.score(signature, metric))
    return {configuration: statistics.fmean(scores) for configuration, scores in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_sweep_comes_to_its_page_and_every_reader_reads_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, trainer = SHIPPED[name], Trainer(failing=[1])
    in_process(monkeypatch, trainer)
    seeds = 3 if len(spec.configurations_at(spec.smoke)) == 1 else 2
    status, said = run(spec, "--runs-dir", str(tmp_path), "--seeds", str(seeds))
    folder = tmp_path / f"{spec.name}-smoke"
    assert status == 1, said  # one run has failed
    assert CAUSE in said
    assert f"completed: knn: {GONE}" in said

    status, text = read(monkeypatch, "status", "--json", str(folder))
    looked = json.loads(text)
    trials = {t["signature"]: t for t in looked["trials"]}
    assert status == 0
    assert sorted(trials) == sorted(trainer.begun)
    pruned = {s for s, t in trials.items() if t["state"] == "pruned"}
    assert bool(pruned) == bool(spec.space)
    assert trials[trainer.begun[1]]["cause"] == CAUSE
    assert trials[trainer.blind]["missing"] == {"knn": GONE}
    assert looked["counts"]["failed"] == 1
    assert looked["counts"]["completed"] == len(trials) - 1 - len(pruned)

    with (folder / "summary.csv").open() as file:
        means = {line["setting"]: line for line in csv.DictReader(file)}
    configurations, gone = {s: t["setting"] for s, t in trials.items()}, {trainer.begun[1], *pruned}
    for metric, without in ((task_of({}).OBJECTIVE, gone), ("knn.test_top1", {*gone, trainer.blind})):
        reported = {configuration: float(line[f"{metric}_mean"]) for configuration, line in means.items() if line[f"{metric}_mean"]}
        assert reported == pytest.approx(expected_means(trainer, configurations, metric, without))
    best = max(expected_means(trainer, configurations, task_of({}).OBJECTIVE, gone).items(), key=lambda found: found[1])
    assert looked["best"]["setting"] == best[0]
    assert looked["best"]["mean"] == pytest.approx(best[1])
    pictures = ["ablation.png", *["accuracy_against_cost.png"] * bool(spec.costs)]
    assert all((folder / picture).stat().st_size > 10_000 for picture in pictures)

    names = set(configurations.values())
    every = {t for t in names if any(s not in pruned for s, configuration in configurations.items() if configuration == t)}
    shown = {form: read(monkeypatch, "results", "--format", form, str(folder)) for form in FORMATS}
    assert {status for status, _ in shown.values()} == {0}
    assert shown["csv"][1] == (folder / "summary.csv").read_text()
    assert all(shown["markdown"][1].count(f"| {configuration} |") == 1 for configuration in every)
    assert shown["latex"][1].count(r" \\") == len(every) + 1
    assert "1 failed" in shown["table"][1]
    assert f"best so far by {task_of({}).OBJECTIVE}: {best[0]}: " in read(monkeypatch, "status", str(folder))[1]

    status, text = read(monkeypatch, "report", str(folder))
    assert (status, text) == (0, f"{folder / 'report.html'}\n")
    page = Text((folder / "report.html").read_text())
    assert names <= set(page.shown)
    assert f"1 of {CAUSE} " in page.shown
    assert f"1 of knn: {GONE} " in page.shown
    assert any("Traceback <of & to> nothing" in shown for shown in page.shown)
    data = json.loads(page.data)
    assert {t["signature"] for t in data["trials"]} == trials.keys()
    assert all(figure["data"] for figure in data["figures"].values())
    assert {"scores-0", "costs"} <= data["figures"].keys()
    assert ("search-0" in data["figures"]) == bool(spec.space)

    completed = looked["counts"]["completed"]
    assert read(monkeypatch, "advice", str(folder))[1].startswith(f"used at most, by {completed} completed runs (counters): time ")
    advised = json.loads(read(monkeypatch, "advice", "--json", str(folder))[1])["trials"]
    assert advised.keys() == trials.keys()
    assert read(monkeypatch, "study", str(folder)) == (0, f"optuna-dashboard {folder / 'optuna.journal'}\n")
    first = looked["trials"][0]
    head = f"{first['name']}: {first['state']}: {folder / 'trials' / first['signature'] / 'log' / 'train.log'}\n"
    assert read(monkeypatch, "logs", "--no-follow", str(folder), "0") == (0, f"{head}training\n")
    assert read(monkeypatch, "logs", "--no-follow", str(folder))[0] == 0
    status, text = read(monkeypatch, "cancel", str(folder))
    assert (status, text) == (0, "0 trials cancelled, 0 jobs ended; run the sweep's command to resume them\n")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_sweep_is_planned_at_paper_scale(name: str, tmp_path: Path) -> None:
    spec = SHIPPED[name]
    line = ["--scale", "paper", "--runs-dir", str(tmp_path), "--dry-run", "--cluster", "komondor", "account=abc"]
    status, said = run(spec, *line)
    seeds, configurations = spec.paper.seeds, len(spec.configurations_at(spec.paper))
    assert status == 0
    assert f"{seeds * configurations if configurations else 1} trials, " in said
    assert "#SBATCH --account=abc" in said
    assert [line for line in said.splitlines() if line.startswith("cost estimate: ")]
    assert not list(tmp_path.iterdir())
    if spec.space:
        assert f"chooses up to {spec.paper.max_trials} configurations; the best of them get up to {seeds} seeds" in said


def tiny_comparison() -> SweepSpec:
    """The method comparison with as few images and epochs as each method can do with."""
    few = ["data.train_limit=96", "data.test_limit=48", "epochs=2", "probes.linear_paper_epochs=2", "log.tensorboard=false"]
    smoke = SHIPPED["method_comparison"].smoke
    configurations = [
        replace(s, overrides={k: 1 if k == "optimizer.warmup_epochs" else v for k, v in s.overrides.items()}) for s in smoke.configurations
    ]
    return replace(
        SHIPPED["method_comparison"], smoke=replace(smoke, overrides=[*smoke.overrides, *few], configurations=configurations, seeds=1)
    )


@pytest.mark.slow
def test_every_method_is_trained_and_stands_on_a_page_that_a_browser_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuild = monitor.rebuild
    in_process(monkeypatch, None)
    monkeypatch.setattr(monitor, "rebuild", rebuild)  # as ever, in a process of its own
    spec, folder = tiny_comparison(), tmp_path / "method_comparison-smoke"
    status, said = run(spec, "--runs-dir", str(tmp_path))
    assert status == 0, said
    assert said.splitlines()[-1] == str(folder / "report.html"), said
    titles = {method_module(name).Config.title for name in method_names()}
    with opened(folder / "report.html") as page:
        names = {cell.text.partition(",")[0] for cell in page.all("#results tbody td:first-child")}
        assert names == titles | {"random resnet_small", "random vit_tiny", "chance level"}
        assert {cell.text.partition(",")[0] for cell in page.all("#trials tbody td:first-child")} == titles
        state = [cell.text for cell in page.all("#trials thead th")].index("state") + 1
        assert {cell.text for cell in page.all(f"#trials tbody td:nth-child({state})")} == {"completed"}
        assert page.complaints() == []
        assert page.empty_figures() == []
        assert len(page.all("#scores-0 .scatterlayer .trace .point")) >= len(titles)


def depths(*configurations: Configuration, **changes: object) -> SweepSpec:
    return replace(tiny_sweep.sweep(), configurations=configurations, **changes)


DEPTH, RATE = "method.predictor.depth", "optimizer.lr"
THREE = [Configuration({DEPTH: depth}, {"linear.test_top1": 60.0}) for depth in (1, 2, 3)]
ALL = range(1000)
SIX = ("linear.test_top1", "linear.test_top5", "knn.test_top1", "knn.test_top5", "knn.holdout_top1", "linear.paper_protocol_top1")
AWKWARD: dict[str, tuple[SweepSpec, list[str], Iterable[int]]] = {
    "one configuration, one seed": (depths(THREE[0]), ["--seeds", "1"], ()),
    "every run failed": (depths(*THREE), ["--seeds", "1"], ALL),
    "one end of the axis failed": (depths(*THREE), ["--seeds", "1"], [0]),
    "more configurations than colours, all failed": (
        depths(*[Configuration({RATE: 0.001 * (i + 1)}) for i in range(26)]),
        ["--seeds", "1"],
        ALL,
    ),
    "no headline": (depths(*THREE, headline=()), ["--seeds", "1"], ()),
    "more of a headline than colours": (depths(*THREE, headline=SIX), ["--seeds", "1"], ()),
    "costs, and no top-1": (depths(*THREE, headline=("linear.test_top5",), costs=("energy_kwh",)), ["--seeds", "1"], ()),
    "a search of one configuration": (tiny_search.SWEEP, ["--seeds", "1", "--max-trials", "1"], ()),
    "a search that completes nothing": (tiny_search.SWEEP, ["--seeds", "1", "--max-trials", "3"], ALL),
    "two objectives, nothing completes": (tiny_search.SWEEP, ["--seeds", "1", "--max-trials", "2", "--two-objectives"], ALL),
}
READERS = ["status", "results", "results --format latex", "report", "advice", "study", "logs --no-follow", "cancel"]


@pytest.mark.slow
@pytest.mark.parametrize("what", AWKWARD)
def test_an_awkward_sweep_comes_to_its_page_too(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, arguments, failing = AWKWARD[what]
    trainer = Trainer(failing=failing, without_value=False)
    in_process(monkeypatch, trainer)
    status, said = run(spec, "--runs-dir", str(tmp_path), *arguments)
    folder = tmp_path / f"{spec.name}-smoke"
    assert status == (1 if failing else 0), said
    assert (folder / "ablation.png").stat().st_size > 5_000
    assert (folder / "accuracy_against_cost.png").exists() == bool(spec.costs)
    assert {command: read(monkeypatch, *command.split(), str(folder))[0] for command in READERS} == dict.fromkeys(READERS, 0)
    names = {t["setting"] for t in json.loads(read(monkeypatch, "status", "--json", str(folder))[1])["trials"]}
    assert names <= set(Text((folder / "report.html").read_text()).shown)


@pytest.mark.slow
def test_completed_runs_without_the_objective_are_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch, Trainer(without_value=False))
    spec = depths(*THREE, objective="linear.strength")
    status, said = run(spec, "--runs-dir", str(tmp_path), "--seeds", "1")
    folder = tmp_path / f"{spec.name}-smoke"
    assert status == 1
    line = "seed42: completed: linear.strength: the run has no value of it, but knn.holdout_top1, knn.paper_protocol_top1, "
    assert said.count(line) == 3, said
    assert {command: read(monkeypatch, *command.split(), str(folder))[0] for command in READERS} == dict.fromkeys(READERS, 0)
    assert "linear.strength has no value: the run has no value of it" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_each_metric_of_a_headline_has_its_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(pictures, "_write_figure", lambda figure, path: drawn.append(figure))
    in_process(monkeypatch, Trainer(without_value=False))
    run(depths(*THREE, headline=SIX), "--runs-dir", str(tmp_path), "--seeds", "1")
    assert [len(axis.lines) for axis in drawn[0].axes] == [6] * 6  # of each configuration the one run's dot, and the mean
    assert [axis.get_xlabel() for axis in drawn[0].axes] == [f"{task_of({}).title(metric)} (%)" for metric in SIX]
