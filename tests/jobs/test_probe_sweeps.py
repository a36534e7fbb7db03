"""Scores of sweeps that are computed later, here and as Slurm jobs."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa.run.folder import RunResult, RunStatus, never
from jobs import probe
from jobs.config import compose_job
from sweeps.execution.changes import left_to_run, take_up
from sweeps.execution.worker import run_one_trial
from sweeps.report import aggregate
from sweeps.report.status import sweep_status
from sweeps.spec.sweep import Configuration, Scale, ScaleName, SweepSpec, build_trials
from sweeps.state.folder import Sweep
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View
from tests.cnnjepa.test_distributed import Launched, finish
from tests.support.images import image_tree
from tests.support.scored import BAD, CLASSES, SMALL, damage, left_behind, result_of, score, trained, weights
from tests.support.searched import end, searched
from tests.support.slurm_bench import ROOT, SweepOnSlurm, needs_slurm
from tests.support.slurm_cluster import SlurmCluster


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path / "tree", CLASSES, images=16)


@pytest.fixture
def undisturbed(tree: Path, tmp_path: Path) -> dict[str, float]:
    """The scores of the second trial of `sweep` where nothing breaks."""
    shutil.copy(tree / BAD, tmp_path / "whole.jpg")
    return trained(tmp_path / "undisturbed", tree, "method.predictor.depth=2").metrics


@pytest.fixture
def sweep(tree: Path, tmp_path: Path, undisturbed: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """Three trials: an image broke while the second was trained, and the third has not begun."""
    configurations = [Configuration({"method.predictor.depth": depth}) for depth in (1, 2, 3)]
    scale = Scale([*SMALL, f"data.root={tree}"], seeds=1)
    spec = SweepSpec("scored", "What is lacking?", configurations=configurations, smoke=scale, paper=scale)
    made = Sweep.of(spec, ScaleName.smoke, build_trials(spec, scale, 1, "local", []), tmp_path / "scored-smoke")
    made.write()
    run_next(made)
    damage(tree / BAD, "empty")
    with monkeypatch.context() as patch:
        patch.setattr("cnnjepa.train.require_probe_images", lambda *_: None)
        run_next(made)
    return made


def run_next(sweep: Sweep) -> str | None:
    return run_one_trial(View(sweep), compose_job(["cluster=local"]).cluster, "driver", never)


def test_a_sweep_is_scored_where_scores_are_missing(tree: Path, tmp_path: Path, undisturbed: dict[str, float], sweep: Sweep) -> None:
    first, second, third = (sweep.trial_dir(trial) for trial in sweep.trials)
    kept = (first / "result.json").read_bytes()
    assert sweep_status(View(sweep))["trials"][1]["missing"].keys() == {"linear", "knn", "collapse"}
    shutil.copy(tmp_path / "whole.jpg", tree / BAD)
    status, out, _ = score(sweep.path)
    assert status == 0
    assert f"{first}: nothing to do, all scores are there\n" in out
    assert f"{second}: scored\n" in out
    assert str(third) not in out
    assert (first / "result.json").read_bytes() == kept
    assert result_of(second).metrics == undisturbed
    view = View(Sweep.load(sweep.path))
    assert [row.cause for row in aggregate.rows(view)[:2]] == ["", ""]
    assert sweep_status(view)["trials"][1]["missing"] == {}
    assert score(second) == (0, f"{second}: nothing to do, all scores are there\n", "")
    assert score(sweep.path)[1].count("nothing to do") == 2


def test_a_damaged_trial_does_not_keep_the_others_from_their_scores(tree: Path, tmp_path: Path, sweep: Sweep) -> None:
    first, second, _ = (sweep.trial_dir(trial) for trial in sweep.trials)
    (first / "result.json").write_text("{")
    shutil.copy(tmp_path / "whole.jpg", tree / BAD)
    status, out, _ = score(sweep.path)
    assert status == 1
    assert f"{first}: not scored: result.json must be a file that this project wrote; got {first / 'result.json'}" in out
    assert result_of(second).missing == {}


def test_retry_failed_takes_up_the_probes_of_completed_trials_and_trains_nothing(
    tree: Path, tmp_path: Path, undisturbed: dict[str, float], sweep: Sweep
) -> None:
    _, second, third = sweep.trials
    folder, before = sweep.run(second), weights(sweep.trial_dir(second))
    steps = (folder.logs / "train.log").read_text().count("step 6/6")
    assert left_to_run(View(sweep), retry_failed=False) == [third]
    assert left_to_run(View(sweep), retry_failed=True) == [second, third]
    shutil.copy(tmp_path / "whole.jpg", tree / BAD)
    take_up(View(sweep), retry_failed=False)
    assert View(sweep).state(second) is TrialState.completed
    take_up(View(sweep), retry_failed=True)
    assert View(sweep).state(second) is TrialState.interrupted
    assert run_next(sweep) == second.signature
    result = result_of(folder.path)
    assert (result.metrics, result.missing) == (undisturbed, {})
    assert (folder.logs / "train.log").read_text().count("step 6/6") == steps == 1
    # The final checkpoint has a second name, of the attempt that scored it.
    assert before.items() <= weights(folder.path).items()
    assert set(weights(folder.path).values()) == set(before.values())
    assert json.loads((folder.path / "result.completed-1.json").read_text())["missing"].keys() == {"linear", "knn", "collapse"}
    assert left_to_run(View(sweep), retry_failed=True) == [third]


@pytest.mark.slow
def test_retry_failed_leaves_alone_what_it_would_have_to_train_again(sweep: Sweep) -> None:
    _, second, third = sweep.trials
    max((sweep.trial_dir(second) / "checkpoints").iterdir()).unlink()
    assert left_to_run(View(sweep), retry_failed=True) == [third]


def test_a_worker_of_a_search_sees_that_a_command_took_a_completed_trial_up(tmp_path: Path) -> None:
    made = searched(tmp_path)
    (first,) = made.trials
    end(made, first, 50.0)
    whole = result_of(made.trial_dir(first))
    view = View(made, remember_seconds=1e9)
    assert view.follow()
    for missing in ({}, {"linear": "OSError: x"}):
        made.run(first).amend_result(RunResult(**{**vars(whole), "missing": missing}))
        view = View(made, remember_seconds=1e9)
        assert view.state(first) is TrialState.completed
        made.run(first).set_aside(RunStatus.completed)
        made.write()
        assert view.follow()
        assert (view.result(first) is None) is bool(missing)
        made.run(first).write_result(whole)


def test_a_dry_run_says_what_is_lacking_and_needs_no_slurm(sweep: Sweep) -> None:
    second = sweep.trial_dir(sweep.trials[1])
    status, out, _ = score(sweep.path, "--dry-run", "probes.names=[linear,knn]")
    assert status == 0
    assert f"{second}: to score: linear, knn\n" in out
    status, out, _ = score(sweep.path, "--cluster", "komondor", "--dry-run", "account=abc")
    assert status == 0
    assert "1 runs to score in 1 jobs\n\n#!/bin/bash" in out
    assert "#SBATCH --account=abc" in out
    assert "-m jobs.probe" in out
    assert not list(sweep.path.rglob("scores"))


def on_two_ranks(*words: str) -> None:
    """A command as srun starts it, of which each task learns of the other by torchrun's variables."""
    finish(Launched(2, ["-m", *words], SLURM_ARRAY_TASK_ID="1"))


@pytest.mark.nightly
def test_a_job_scores_its_share_on_its_ranks_as_they_would_have_at_the_end(tree: Path, tmp_path: Path) -> None:
    small = [*SMALL, f"data.root={tree}", "micro_batch_size=8"]
    for name, names in {"whole": "[linear,knn,collapse]", "scored": "[knn]"}.items():
        on_two_ranks("jobs.pretrain", *small, f"probes.names={names}", f"run_dir={tmp_path / name}")
    shutil.copytree(tmp_path / "scored", tmp_path / "other")
    request, _ = probe.request_of([tmp_path / "scored"], "local", ["probes.names=[linear,knn,collapse]"])
    file = tmp_path / "request.json"
    replace(request, runs=[tmp_path / "other", tmp_path / "scored"], jobs=2).write(file)
    on_two_ranks("jobs.probe", str(file))
    assert result_of(tmp_path / "scored").metrics == result_of(tmp_path / "whole").metrics
    (kept,) = (tmp_path / "scored").glob("scores/linear-*.json")
    assert json.loads(kept.read_text())["computed"][0]["ranks"] == 2
    assert not list((tmp_path / "other").glob("scores/*.json")), "that is another job's share"


class OnSlurm:
    """The command on the test cluster, with two ranks a job as the trials had."""

    def __init__(self, cluster: SlurmCluster) -> None:
        self.cluster = cluster

    def score(self, path: Path) -> str:
        line = [sys.executable, "-m", "jobs.probe", str(path), "--cluster", "test_cluster", "ranks_per_trial=2", "cores_per_trial=2"]
        done = subprocess.run(line, cwd=ROOT, env=self.cluster.environment, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.mark.nightly
@needs_slurm
@pytest.mark.slow
@pytest.mark.xdist_group("slurm-2")
@pytest.mark.parametrize("arrays", [1001, pytest.param(1, marks=pytest.mark.nightly)])
def test_a_sweep_on_slurm_is_scored_by_jobs_once_its_image_is_repaired(arrays: int, cluster: SlurmCluster, tmp_path: Path) -> None:
    cluster.change(max_array_size=arrays)
    trees = {name: image_tree(tmp_path / name, CLASSES, images=40) for name in ("broken", "sound")}
    sweeps = {name: SweepOnSlurm(cluster, tmp_path / f"{name}-runs") for name in trees}
    sweeps["broken"].hold(5)
    for name, one in sweeps.items():
        data = ["data=imagefolder", f"data.root={trees[name]}", "data.image_size=32", "data.holdout_fraction=0.25", "data.test_limit=0"]
        one.submit("two", "epochs=2", *data)
    sweeps["broken"].wait("two held trials", lambda: all(sweeps["broken"].step_of(d) >= 5 for d in sweeps["broken"].trial_dirs()))
    whole = (trees["broken"] / BAD).read_bytes()
    damage(trees["broken"] / BAD, "truncated")
    sweeps["broken"].release()
    for one in sweeps.values():
        one.wait_for_end()
    folders, sound = (one.trial_dirs() for one in (sweeps["broken"], sweeps["sound"]))
    for folder in folders:
        assert result_of(folder).metrics == {}
        assert str(trees["broken"] / BAD) in result_of(folder).missing["linear"]
    before = [left_behind(folder) for folder in folders]

    (trees["broken"] / BAD).write_bytes(whole)
    path, command = sweeps["broken"].path, OnSlurm(cluster)
    out = command.score(path)
    assert out.count("1 runs to score in a single job") == 2 if arrays == 1 else "2 runs to score in 2 jobs" in out
    again = command.score(path)
    assert "is queued or runs and scores this: nothing was submitted" in again or again.count("nothing to do") == 2
    cluster.wait("the jobs to end", lambda: not cluster.run("squeue", "-h").strip(), 200)
    log = "".join(p.read_text() for p in (path / "log").glob("*.log"))
    for folder, other in zip(folders, sound, strict=True):
        assert result_of(folder).missing == {}, log
        assert result_of(folder).metrics == result_of(other).metrics
    assert [left_behind(folder) for folder in folders] == before, "nothing was trained"
    assert command.score(path).count("nothing to do, all scores are there") == 2
    assert cluster.run("squeue", "-h") == ""
