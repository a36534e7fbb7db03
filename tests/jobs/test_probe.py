"""Scores of completed runs that are computed later, and the look at all probe images before training."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnjepa.data import opened
from cnnjepa.data.datasets import load_splits
from cnnjepa.data.packed import PackedImages
from cnnjepa.run.folder import RunFolder, RunResult, RunStatus, never
from cnnjepa.run.scores import locked
from jobs import pretrain, probe
from jobs.config import compose_job
from jobs.run import run_job
from sweeps.execution.changes import left_to_run, take_up
from sweeps.execution.worker import run_one_trial
from sweeps.report import aggregate
from sweeps.report.status import sweep_status
from sweeps.spec.sweep import Configuration, Scale, ScaleName, SweepSpec, build_trials
from sweeps.state.folder import Sweep, TrialState, View
from tests.cnnjepa.test_distributed import Launched, finish
from tests.support import packing
from tests.support.images import image_tree, write_idx
from tests.support.searched import end, searched
from tests.support.slurm_bench import ROOT, SweepOnSlurm, needs_slurm
from tests.support.slurm_cluster import SlurmCluster

CLASSES = ["ant", "bee", "cat"]
SMALL = [
    "data=imagefolder",
    "data.image_size=32",
    "data.holdout_fraction=0.25",
    "encoder.width=8",
    "epochs=2",
    "optimizer.warmup_epochs=1",
    "global_batch_size=16",
    "micro_batch_size=16",
    "probes.linear_paper_epochs=3",
    "log.tensorboard=false",
]
BAD = "val/bee/3.jpg"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path / "tree", CLASSES, images=16)


def called(main: Callable[[], int], *words: object) -> tuple[int, str, str]:
    """Exit status and output of a command in this process."""
    done = packing.run(*words, main=lambda: _without_workers(main))
    return done.returncode, done.stdout, done.stderr


def _without_workers(main: Callable[[], int]) -> int:
    del sys.argv[-2:]  # --workers, which only the commands of packed sets have
    return main()


def score(*words: object) -> tuple[int, str, str]:
    return called(probe.main, *words)


def result_of(path: Path) -> RunResult:
    found = RunFolder(path).result()
    assert found is not None
    return found


def damage(file: Path, how: str) -> None:
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"<html>not found</html>"}[how])


def trained(path: Path, tree: Path, *overrides: str, breaks: str = "") -> RunResult:
    """A finished run; the image `breaks` is emptied once training has begun."""
    job = compose_job([*SMALL, f"data.root={tree}", f"run_dir={path}", *overrides])

    def begun() -> bool:
        if breaks:
            damage(tree / breaks, "empty")
        return False

    result = run_job(job, begun)
    assert result is not None
    assert result.status is RunStatus.completed
    return result


def weights(path: Path) -> dict[str, bytes]:
    return {k: v for k, v in left_behind(path).items() if k.endswith(".pt")}


def left_behind(path: Path) -> dict[str, bytes]:
    """All that training writes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in [path / "metrics.jsonl", *(path / "checkpoints").iterdir()]}


@pytest.mark.parametrize("how", ["empty", "truncated", "text"])
@pytest.mark.parametrize("name", [BAD, "train/ant/5.jpg"])
def test_a_damaged_image_is_found_before_training(tree: Path, tmp_path: Path, how: str, name: str) -> None:
    damage(tree / name, how)
    status, out, err = called(pretrain.main, *SMALL, f"data.root={tree}", f"run_dir={tmp_path / 'run'}")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: data.root must hold images that can be decoded; got {tree / name}: ")
    assert err.endswith(": repair or remove it, then run again\n")
    assert "0x" not in err, "an address says nothing"
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_run_that_nobody_checked_looks_itself_before_its_first_step(tree: Path, tmp_path: Path) -> None:
    damage(tree / BAD, "empty")
    result = run_job(compose_job([*SMALL, f"data.root={tree}", f"run_dir={tmp_path / 'run'}"]))
    assert result is not None
    assert (result.status, result.step) == (RunStatus.failed, 0)
    assert f"{tree / BAD}: no image in its 0 bytes: repair or remove it" in result.cause
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_a_run_without_probes_needs_no_images_for_them(tree: Path, tmp_path: Path) -> None:
    damage(tree / BAD, "empty")
    trained(tmp_path / "run", tree, "probes.names=[]")


def test_several_damaged_images_are_counted(tree: Path) -> None:
    for number in (1, 2, 3):
        damage(tree / f"val/bee/{number}.jpg", "empty")
    splits = load_splits(compose_job([*SMALL, f"data.root={tree}"]).train.data)
    with pytest.raises(ValueError, match=r"val/bee/1\.jpg: .* \(and 2 more\)"):
        opened.require_decodable(splits, "data.root", threads=2)


def test_a_packed_set_is_looked_through_as_well(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    assert packing.run(tree, folder).returncode == 0
    data = compose_job([*SMALL, f"data.root={folder}"]).train.data
    splits = load_splits(data)
    opened.require_decodable(splits, "data.root")
    images = splits.dataset.test
    assert isinstance(images, PackedImages)
    start = int(images._start[20])
    with open(images.paths[0], "r+b") as file:
        file.seek(start)
        file.write(bytes(40))
    with pytest.raises(ValueError, match=r"val-00000\.arrow, image 20: ") as caught:
        opened.require_decodable(load_splits(data), "data.root")
    assert "repair or remove" in str(caught.value)


def test_what_was_decoded_is_not_decoded_again_unless_it_has_changed(tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(opened.tempfile, "gettempdir", lambda: str(tmp_path))
    decoded: list[int] = []
    damaged = opened.damaged
    monkeypatch.setattr(opened, "damaged", lambda images, chunk: decoded.extend(chunk) or damaged(images, chunk))
    splits = load_splits(compose_job([*SMALL, f"data.root={tree}"]).train.data)
    opened.require_decodable(splits, "data.root")
    assert len(decoded) == 2 * 48
    opened.require_decodable(splits, "data.root")
    assert len(decoded) == 2 * 48
    damage(tree / BAD, "truncated")
    with pytest.raises(ValueError, match="must hold images that can be decoded"):
        opened.require_decodable(splits, "data.root")
    assert len(decoded) == 4 * 48


def test_of_a_large_set_the_held_out_and_the_test_images_are_decoded_alone(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = load_splits(compose_job([*SMALL, f"data.root={tree}"]).train.data)
    monkeypatch.setattr(opened, "FIT_IMAGES", len(splits.fit) - 1)
    assert [len(indices) for _, indices in opened.probe_files(splits)] == [12, 48]
    assert np.array_equal(opened.probe_files(splits)[0][1], splits.holdout)
    assert opened.probe_files(load_splits(compose_job(["data=digits"]).train.data)) == []


def test_ranks_share_the_look(tree: Path) -> None:
    damage(tree / BAD, "empty")
    splits = load_splits(compose_job([*SMALL, f"data.root={tree}"]).train.data)
    found = []
    for rank in range(3):
        try:
            opened.require_decodable(splits, "data.root", rank=rank, ranks=3)
        except ValueError:
            found.append(rank)
    assert len(found) == 1


def test_a_run_whose_image_broke_is_scored_once_it_is_repaired(tree: Path, tmp_path: Path) -> None:
    whole, run = (tree / BAD).read_bytes(), tmp_path / "run"
    undisturbed = trained(tmp_path / "undisturbed", tree)
    broken = trained(run, tree, breaks=BAD)
    assert broken.metrics == {}
    assert broken.missing == dict.fromkeys(["linear", "knn", "collapse"], f"OSError: {tree / BAD}: no image in its 0 bytes")
    before, ended = left_behind(run), RunFolder(run).ended_at()

    status, out, _ = score(run)
    assert status == 1
    assert f"linear has no value: OSError: {tree / BAD}" in out
    assert result_of(run) == broken

    (tree / BAD).write_bytes(whole)
    status, out, err = score(run)
    assert (status, err) == (0, "")
    scored = result_of(run)
    assert scored.metrics == undisturbed.metrics
    assert scored.missing == {}
    assert (scored.seconds, scored.claim, scored.step) == (broken.seconds, broken.claim, broken.step)
    assert left_behind(run) == before, "nothing was trained"
    assert RunFolder(run).ended_at() == ended
    assert f"  linear.test_top1 = {undisturbed.metrics['linear.test_top1']:.2f}\n" in out
    (kept,) = run.glob("scores/linear-*.json")
    computed = json.loads(kept.read_text())["computed"]
    assert [bool(c["missing"]) for c in computed] == [True, False], "each attempt is on record"

    assert score(run) == (0, f"{run}: nothing to do, all scores are there\n", "")


def test_the_cause_names_the_file_where_another_process_reads_it(tree: Path, tmp_path: Path) -> None:
    broken = trained(tmp_path / "run", tree, "probes.names=[knn]", "data.workers=1", breaks=BAD)
    assert broken.missing == {"knn": f"OSError: {tree / BAD}: no image in its 0 bytes"}


def test_pretrain_names_the_command_that_scores_later(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "run_job", lambda job, _stop: RunResult(RunStatus.completed, missing={"knn": "ValueError: x"}))
    status, out, _ = called(pretrain.main, *SMALL, f"data.root={tree}", f"run_dir={tmp_path / 'run'}")
    assert status == 1
    assert out.endswith(f"python -m jobs.probe {tmp_path / 'run'} computes what has no value, without training\n")


def test_scores_under_other_settings_stand_beside_those_of_the_run(tree: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = trained(run, tree)
    status, out, _ = score(run, "probes.knn_k=1")
    assert status == 0
    assert "linear" not in out, "its settings are the run's own"
    assert result_of(run) == result
    (kept,) = run.glob("scores/*.json")
    values = json.loads(kept.read_text())
    assert values["settings"]["knn_k"] == 1
    assert values["metrics"]["knn.test_top1"] == trained(tmp_path / "other", tree, "probes.knn_k=1").metrics["knn.test_top1"]
    assert score(run, "probes.knn_k=1")[1] == f"{run}: nothing to do, all scores are there\n"
    assert score(run)[1] == f"{run}: nothing to do, all scores are there\n"


def test_a_further_probe_joins_the_result_and_replaces_nothing(tree: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = trained(run, tree, "probes.names=[knn]")
    # A value that no probe would give: were it computed again, it would change.
    RunFolder(run).amend_result(RunResult(**{**vars(first), "metrics": {**first.metrics, "knn.test_top1": 12.5}}))
    assert score(run, "probes.names=[linear,knn]")[0] == 0
    everything = trained(tmp_path / "other", tree).metrics
    linear = {k: v for k, v in everything.items() if k.startswith("linear.")}
    assert result_of(run).metrics == {**first.metrics, "knn.test_top1": 12.5, **linear}


def fashion(root: Path) -> Path:
    drawn = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 24)):
        write_idx(root / f"{part}-images-idx3-ubyte", drawn.integers(0, 256, (count, 28, 28)), packed=False)
        write_idx(root / f"{part}-labels-idx1-ubyte", np.arange(count) % 10, packed=False)
    return root


def test_another_labelled_set_is_scored_by_its_name(tree: Path, tmp_path: Path) -> None:
    run, data = tmp_path / "run", f"probes.data=[fashion_mnist:{fashion(tmp_path / 'fashion')}]"
    plain = trained(run, tree)
    assert score(run, data)[0] == 0
    scored = result_of(run).metrics
    assert {k for k in scored if k not in plain.metrics} == {
        f"{name}.fashion_mnist.{part}_{top}" for name in ("linear", "knn") for part in ("holdout", "test") for top in ("top1", "top5")
    } | {f"collapse.fashion_mnist.{k}" for k in ("feature_std", "rankme")} | {
        f"linear.fashion_mnist.{k}" for k in ("paper_protocol_top1", "strength", "iterations", "relative_gradient")
    }
    counts = result_of(run).images
    assert counts.keys() == {k for k in scored if "_top" in k}, "each score says on how many images it rests"
    assert counts["linear.fashion_mnist.test_top1"] != counts["linear.test_top1"]
    asked = trained(tmp_path / "asked", tree, data)
    assert asked.metrics == scored, "a run that asks for it from the start has the same scores"
    assert score(run, data)[1] == score(run)[1] == f"{run}: nothing to do, all scores are there\n"
    assert score(tmp_path / "asked", data)[1].endswith("nothing to do, all scores are there\n")


def test_a_set_of_the_same_name_elsewhere_is_another_one(tree: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run, tree, "probes.names=[knn]")
    one, other = (image_tree(tmp_path / name, ["x", "y"], images=count) for name, count in (("one", 10), ("other", 15)))
    assert score(run, f"probes.data=[imagefolder:{one}]")[0] == 0
    first = result_of(run)
    assert "knn.imagefolder.test_top1" in first.metrics
    assert score(run, f"probes.data=[imagefolder:{other}]")[0] == 0
    assert result_of(run) == first, "its scores stay those of the first"
    assert len(list(run.glob("scores/knn.imagefolder-*.json"))) == 2


def test_a_set_that_is_not_there_is_a_missing_value(tree: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = trained(run, tree, "probes.names=[knn]")
    nowhere = tmp_path / "nowhere"
    status, out, _ = score(run, f"probes.data=[imagefolder:{nowhere}]")
    assert status == 1
    assert f"has no value: ValueError: probes.data must name a set that is there; got imagefolder:{nowhere}: data.root must hold" in out
    assert result_of(run) == result


def test_a_run_that_turns_out_to_have_collapsed_fails_as_it_would_have(tree: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run, tree, "probes.names=[knn]")
    status, out, _ = score(run, "probes.names=[knn,collapse]", "probes.collapsed_rankme=1e9")
    assert status == 1
    found = result_of(run)
    assert found.status is RunStatus.failed
    assert found.cause.startswith("CollapsedError: collapsed: collapse.rankme is ")
    assert found.metrics == {}
    assert found.cause in out
    assert json.loads((run / "result.completed-1.json").read_text())["metrics"]["knn.test_top1"] >= 0
    assert score(run) == (2, "", f"error: RUN_OR_SWEEP must hold a run that has completed; got {run}, where none has\n")


def test_without_its_final_checkpoint_a_run_is_not_scored(tree: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run, tree, "probes.names=[knn]")
    newest = max((run / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    status, out, _ = score(run, "probes.names=[linear]")
    assert status == 1
    assert "not scored: a run to score must hold an intact checkpoint of its last step, 6; got " in out


def test_two_commands_do_not_score_a_run_at_once(tree: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run, tree, "probes.names=[knn]")
    line = [sys.executable, "-m", "jobs.probe", str(run), "probes.names=[knn,collapse]"]
    with locked(RunFolder(run), wait=False) as ours:
        assert ours
        with locked(RunFolder(run), wait=False) as theirs:
            assert not theirs
        other = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == f"{run}: waits for another command that scores it\n"
        assert not list(run.glob("scores/*.json"))
    out, _ = other.communicate(timeout=120)
    assert other.returncode == 0
    assert "collapse.rankme = " in out
    assert score(run, "probes.names=[knn,collapse]")[1] == f"{run}: nothing to do, all scores are there\n"


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
        patch.setattr("cnnjepa.train.require_probe_images", lambda _run: None)
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
    assert weights(folder.path) == before
    assert json.loads((folder.path / "result.completed-1.json").read_text())["missing"].keys() == {"linear", "knn", "collapse"}
    assert left_to_run(View(sweep), retry_failed=True) == [third]


def test_retry_failed_leaves_alone_what_it_would_have_to_train_again(sweep: Sweep) -> None:
    _, second, third = sweep.trials
    max((sweep.trial_dir(second) / "checkpoints").iterdir()).unlink()
    assert left_to_run(View(sweep), retry_failed=True) == [third]


def test_a_worker_of_a_search_sees_that_a_command_took_a_completed_trial_up(tmp_path: Path) -> None:
    made = searched(tmp_path)
    (first,) = made.trials
    end(made, first, None)
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


WRONG = [
    (["nowhere"], "RUN_OR_SWEEP must be a run folder, with config.yaml, or a sweep folder, with sweep.json; got "),
    (["begun"], "RUN_OR_SWEEP must hold a run that has completed; got "),
    (["run", "epochs=3"], "an override must begin with probes., or be data.root, data.workers, device or a key of the cluster profile: "),
    (["run", "data=digits"], "an override must begin with probes., or be data.root"),
    (["run", "data.root=/elsewhere"], "data.root must be as it was when the run was trained; got data.root: "),
    (["run", "probes.knn=3"], "probes.knn must be a key of the configuration; got probes.knn=3; did you mean probes.knn_k?"),
    (["run", "probes.knn_k=0"], "probes.knn_k must be at least 1; got 0"),
    (["run", "probes.names=[guess]"], "probes.names must hold only names from collapse, knn, linear; got guess"),
    (["run", "probes.data=[cifar]"], "probes.data must hold NAME or NAME:ROOT, NAME out of digits, fashion_mnist, imagefolder, "),
    (["run", "probes.data=[imagefolder:here]"], "and ROOT an absolute path; got imagefolder:here"),
    (["run", "probes.data=[digits,digits]"], "probes.data must name no set twice, since scores are named by it; got digits, digits"),
    (["run", "--cluster", "summit"], "cluster must be one of komondor, komondor_test, local, test_cluster; got summit"),
    (["run", "--cluster", "komondor"], "cluster.account must be given for cluster komondor; got none: add account=VALUE"),
    (["run", "--clster", "local"], "--clster must be an option listed by --help; got --clster local; did you mean --cluster?"),
    (["softmax"], "task must define probed and probe to have its runs scored later; got tests.support.softmax_task"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_use_is_one_line(words: list[str], message: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, overrides in {
        "begun": [*SMALL, f"data.root={tree}"],
        "run": [*SMALL, f"data.root={tree}"],
        "softmax": ["task=tests.support.softmax_task"],
    }.items():
        folder = RunFolder(tmp_path / name)
        folder.prepare(compose_job(overrides).train)
        if name != "begun":
            folder.write_result(RunResult(RunStatus.completed, step=6))
    status, out, err = score(*words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("scores"))


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


@needs_slurm
@pytest.mark.slow
@pytest.mark.xdist_group("slurm-2")
def test_a_sweep_on_slurm_is_scored_by_jobs_once_its_image_is_repaired(cluster: SlurmCluster, tmp_path: Path) -> None:
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
    assert "2 runs to score in 2 jobs" in command.score(path)
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
