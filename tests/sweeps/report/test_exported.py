"""Sweeps in MLflow and W&B, with the real libraries: numbers as in results.csv, and no run twice."""

import csv
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cnnjepa.run.folder import RunStatus
from sweeps import __main__ as command_line
from sweeps.report import tables
from sweeps.report.aggregate import COSTS
from sweeps.report.export_mlflow import accepted
from sweeps.report.exported import TABLES, exported_runs
from sweeps.spec.sweep import Trial
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.support import exported
from tests.support.documented import typed
from tests.support.scored import called

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("trackers")]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for the module: to make one takes seconds. Each test has an experiment of its own."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def made(tmp_path: Path) -> Sweep:
    return exported.swept(tmp_path / "tiny_sweep-paper")


class Tracked:
    """The sweep in an experiment of its own."""

    def __init__(self, made: Sweep, uri: str, experiment: str) -> None:
        from mlflow import MlflowClient

        self.made, self.uri, self.experiment, self.client = made, uri, experiment, MlflowClient(uri)
        self.client.create_experiment(experiment, f"{made.path.parent}/artifacts")

    def export(self) -> str:
        from sweeps.report import export_mlflow

        for name in TABLES:
            (self.made.path / name).touch()  # tests of the tables make them
        return export_mlflow.export(View(self.made), self.uri, self.experiment)[-1]

    def runs(self) -> dict[str, Any]:
        """Runs by name; no two have the same."""
        of = self.client.get_experiment_by_name(self.experiment).experiment_id
        found = self.client.search_runs([of])
        assert len({r.info.run_name for r in found}) == len(found)
        return {r.info.run_name: r for r in found}

    def curve(self, run: Any, name: str) -> list[tuple[int, float]]:
        return [(m.step, m.value) for m in self.client.get_metric_history(run.info.run_id, name)]


@pytest.fixture
def tracked(made: Sweep, uri: str, request: pytest.FixtureRequest) -> Tracked:
    return Tracked(made, uri, request.node.name)


def rows(made: Sweep) -> dict[str, dict[str, str]]:
    return {row["signature"]: row for row in csv.DictReader(io.StringIO(tables.results_csv(View(made))))}


def numbers(made: Sweep, trial: Trial) -> dict[str, float]:
    """The scores and costs of a trial in results.csv."""
    result, row = made.run(trial).result(), rows(made)[trial.signature]
    return {name: float(row[name]) for name in (*result.metrics, *COSTS) if row[name]}


def names(made: Sweep) -> dict[str, str]:
    """Run ID -> name of the run in a tracker."""
    return {run.tags["sweep.run_id"]: run.name for run in exported_runs(View(made))[0]}


def test_mlflow_has_a_run_for_each_trial_with_the_numbers_of_results_csv(tracked: Tracked) -> None:
    made = tracked.made
    given = {"runs/predictor_ablation-smoke": str(made.path), "sqlite:///mlflow.db": tracked.uri, "predictors": tracked.experiment}
    words = typed(
        "python -m sweeps export runs/predictor_ablation-smoke --to mlflow --tracking-uri sqlite:///mlflow.db --experiment predictors",
        given,
    )
    status, out, _ = called(command_line.main, *words[3:])
    assert status == 0
    assert out.splitlines() == [
        "left out, since they have not begun: 1 trials; the same command adds them later",
        f"runs: 3 added; in experiment {tracked.experiment} of {tracked.uri}",
    ]
    runs, of = tracked.runs(), names(made)
    assert set(runs) == {"tiny_sweep-paper", *of.values()}
    for trial in made.trials[:3]:
        run = runs[of[trial.signature]]
        scores = {name: value for name, value in run.data.metrics.items() if "/" not in name and name != "epoch"}
        assert scores == numbers(made, trial)
        records = made.run(trial).metrics()
        for kind, key in (("step", "loss"), ("step", "images_per_second"), ("probe", exported.OBJECTIVE)):
            own = [(r["step"], r[key]) for r in records if r["kind"] == kind]
            assert tracked.curve(run, f"{kind}/{key}") == own
        assert run.data.params["optimizer.lr"] == str(trial.values["optimizer"]["lr"])
        assert run.data.params["method.predictor.depth"] == str(trial.values["method"]["predictor"]["depth"])
        files = {f.path for f in tracked.client.list_artifacts(run.info.run_id)}
        assert files >= {"config.yaml", "metrics.jsonl", "provenance.json", "result.json", "train.log"}
        assert yaml.safe_load(Path(tracked.client.download_artifacts(run.info.run_id, "config.yaml")).read_text()) == trial.values
    # How it ended, and where it came from.
    assert [runs[of[t.signature]].info.status for t in made.trials[:3]] == ["FINISHED", "FAILED", "KILLED"]
    tags = runs[of[made.trials[1].signature]].data.tags
    said = {name: tags[f"sweep.{name}"] for name in ("state", "cause", "code", "command", "attempts", "commit")}
    assert said == {
        "state": "failed",
        "cause": "NonFiniteError: loss nan",
        "code": exported.CODE,
        "command": "python sweeps/tiny_sweep.py --cluster local",
        "attempts": "1",
        "commit": "c0ffee",
    }
    assert tags["sweep.nodes"]
    parent = runs["tiny_sweep-paper"]
    assert tags["mlflow.parentRunId"] == parent.info.run_id
    assert {f.path for f in tracked.client.list_artifacts(parent.info.run_id)} == {
        "results.csv",
        "summary.csv",
        "ablation.png",
        "sweep.json",
    }


def test_mlflow_is_brought_up_to_date_and_nothing_is_there_twice(tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", tracked.uri)
        patched.setenv("MLFLOW_EXPERIMENT_NAME", tracked.experiment)
        given = {"runs/predictor_ablation-smoke": str(tracked.made.path)}
        words = typed("python -m sweeps export runs/predictor_ablation-smoke --to mlflow", given)
        assert called(command_line.main, *words[3:])[0] == 0
    before, made = tracked.runs(), tracked.made
    last, failed = made.trials[3], made.trials[1]
    exported.claim(made, last)
    exported.end(made, last, None, steps=4)
    one = before[names(made)[failed.signature]].info
    twice = tracked.client.create_run(one.experiment_id, one.start_time + 1, {"sweep.key": f"{made.path.name}/{failed.signature}"}, "twice")
    assert tracked.export().startswith("runs: 1 added, 3 unchanged;")
    name, now = names(made)[last.signature], tracked.runs()
    assert (len(now), "twice" in now, now[name].info.status) == (5, False, "SCHEDULED"), "of two exports at once, one run stays"
    assert twice.info.run_id != one.run_id
    first = now[name]
    tracked.client.set_tag(one.run_id, "mine", "look at this")
    made.run(failed).set_aside(RunStatus.failed)
    exported.end(made, last, RunStatus.completed)
    exported.end(made, failed, RunStatus.completed, steps=8)
    # The costs of the failed run are at its old end, where MLflow cannot change them.
    assert tracked.export().startswith("runs: 1 updated, 1 replaced, 2 unchanged;")
    now = tracked.runs()
    assert (len(now), now[name].info.run_id) == (5, first.info.run_id)
    assert [step for step, _ in tracked.curve(now[name], "step/loss")] == [1, 2, 3, 4, 5, 6]
    retried = now[names(made)[failed.signature]]
    assert (retried.info.status, retried.data.tags["mine"], "sweep.cause" in retried.data.tags) == ("FINISHED", "look at this", False)
    assert {n: r.info.run_id for n, r in now.items() if n in before and n != retried.info.run_name} == {
        n: r.info.run_id for n, r in before.items() if n != retried.info.run_name
    }


class Killed(BaseException):
    pass


def killing(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """`function`, which at its call number `at` is done and then ends everything."""
    calls = iter(range(1, 10**6))

    def call(*args: Any, **more: Any) -> Any:
        found = function(*args, **more)
        if next(calls) == at:
            raise Killed
        return found

    return call


@pytest.mark.parametrize(
    ("where", "at"),
    [("log_batch", 6), *(pytest.param(*w, marks=pytest.mark.nightly) for w in [("create_run", 2), ("log_artifact", 7), ("set_tag", 8)])],
)
def test_an_export_to_mlflow_that_was_killed_is_completed(tracked: Tracked, where: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, where, killing(getattr(MlflowClient, where), at))
        with pytest.raises(Killed):
            tracked.export()
    tracked.export()
    runs, of = tracked.runs(), names(tracked.made)
    assert len(runs) == 4
    for trial in tracked.made.trials[:3]:
        found = runs[of[trial.signature]]
        assert [step for step, _ in tracked.curve(found, "step/loss")] == [1, 2, 3, 4, 5, 6]
        assert "sweep.digest" in found.data.tags
    assert tracked.export().startswith("runs: 3 unchanged;")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("WANDB_DIR", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_wandb_has_offline_what_results_csv_has_and_is_written_anew_where_it_changed(made: Sweep, here: Path) -> None:
    from tests.support.wandb_file import offline_runs

    words = typed(
        "python -m sweeps export runs/predictor_ablation-smoke --to wandb --offline", {"runs/predictor_ablation-smoke": str(made.path)}
    )[3:]
    status, out, err = called(command_line.main, *words)
    assert (status, err) == (0, "")
    assert out.splitlines()[1].startswith("runs: 3 written; in project tiny_sweep-paper below ")
    runs, of = offline_runs(here / "wandb"), names(made)
    assert set(runs) == {"tiny_sweep-paper", *of.values()}
    for trial in made.trials[:3]:
        run, row = runs[of[trial.signature]], rows(made)[trial.signature]
        assert {name: run.summary[name] for name in numbers(made, trial)} == numbers(made, trial)
        records = [r for r in made.run(trial).metrics() if r["kind"] == "step"]
        assert [(r["_step"], r["step/loss"], r["epoch"]) for r in run.rows] == [(r["step"], r["loss"], r["epoch"]) for r in records]
        assert {key: run.config[key] for key in ("optimizer", "method", "seed")} == {
            key: json.loads(json.dumps(trial.values[key])) for key in ("optimizer", "method", "seed")
        }
        assert (run.tags, run.group, run.config["sweep"]["code"]) == ([row["state"]], trial.label, exported.CODE)
        assert "config.yaml" in next(iter(run.artifacts.values()))
    assert [runs[of[t.signature]].exit_code for t in made.trials[:3]] == [0, 1, 0]
    assert "results.csv" in next(iter(runs["tiny_sweep-paper"].artifacts.values()))
    # Killed in the middle, as it leaves the folder of a run that is not whole; then a trial more.
    half = next((here / "wandb").glob(f"offline-run-*-{made.trials[0].signature}"))
    (half / "sweep-export.txt").unlink()
    exported.claim(made, made.trials[3])
    exported.end(made, made.trials[3], RunStatus.completed)
    assert called(command_line.main, *words)[1].startswith("runs: 1 written, 1 updated, 2 unchanged; in project tiny_sweep-paper")
    assert set(offline_runs(here / "wandb")) == {"tiny_sweep-paper", *names(made).values()}
    assert len(offline_runs(here / "wandb")) == 5


def test_names_that_mlflow_refuses_are_changed_with_a_line_and_two_that_become_one_are_refused(made: Sweep) -> None:
    run = dataclasses.replace(exported_runs(View(made))[0][0], scores={"top-1 (%)": 1.0, "fine": 2.0}, params={"long": "x" * 7000})
    lines: list[str] = []
    found = accepted(run, lines)
    assert found.scores == {"top-1 ___": 1.0, "fine": 2.0}
    assert len(found.params["long"]) == 6000
    assert lines == [
        "MLflow takes letters, digits and ._-/: in a name: top-1 (%) is called top-1 ___",
        "MLflow takes 6000 characters of a parameter: of long the rest is in config.yaml of the run",
    ]
    with pytest.raises(ValueError, match="names of metrics must differ"):
        accepted(dataclasses.replace(run, scores={"a(": 1.0, "a)": 2.0}), [])
