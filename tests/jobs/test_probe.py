"""Scores of completed runs that are computed later."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from cnnjepa.run.scores import locked
from jobs import pretrain
from jobs.config import compose_job
from tests.support.images import image_tree, write_idx
from tests.support.scored import BAD, CLASSES, SMALL, called, left_behind, result_of, score, trained
from tests.support.slurm_bench import ROOT


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path / "tree", CLASSES, images=16)


@pytest.mark.slow
def test_a_run_whose_image_broke_is_scored_once_it_is_repaired(tree: Path, tmp_path: Path) -> None:
    whole, run = (tree / BAD).read_bytes(), tmp_path / "run"
    undisturbed = trained(tmp_path / "undisturbed", tree)
    broken = trained(run, tree, breaks=BAD)
    assert broken.metrics == {}
    assert broken.missing == dict.fromkeys(["linear", "knn", "collapse"], f"DamagedImagesError: {tree / BAD}: no image in its 0 bytes")
    before, ended = left_behind(run), RunFolder(run).ended_at()

    status, out, _ = score(run)
    assert status == 1
    assert f"linear has no value: DamagedImagesError: {tree / BAD}" in out
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
    assert broken.missing == {"knn": f"DamagedImagesError: {tree / BAD}: no image in its 0 bytes"}


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


WRONG = [
    (["nowhere"], "RUN_OR_SWEEP must be a run folder, with config.yaml, or a sweep folder, with sweep.json; got "),
    (["begun"], "RUN_OR_SWEEP must hold a run that has completed; got "),
    (["run", "epochs=3"], "an override must begin with probes., or be data.root, data.workers, device or a key of the cluster profile: "),
    (["run", "data=digits"], "an override must begin with probes., or be data.root"),
    (["run", "data.root=/elsewhere"], "data.root must be as it was when the run was trained; got data.root: "),
    (["run", "probes.knn=3"], "probes.knn must be a key of the configuration; got probes.knn=3; did you mean probes.knn_k?"),
    (["run", "probes.knn_k=0"], "probes.knn_k must be at least 1; got 0"),
    (
        ["run", "probes.names=[guess]"],
        "label_fraction, linear, robustness; got guess",
    ),
    (["run", "probes.data=[cifar]"], "probes.data must hold NAME or NAME:ROOT, NAME out of digits, fashion_mnist, imagefolder, "),
    (["run", "probes.data=[imagefolder:here]"], "and ROOT an absolute path; got imagefolder:here"),
    (["run", "probes.data=[digits,digits]"], "probes.data must name no set twice, since scores are named by it; got digits, digits"),
    (["run", "--cluster", "summit"], "cluster must be one of komondor, komondor_test, local, test_cluster; got summit"),
    (["run", "--cluster", "komondor"], "cluster.account must be given for cluster komondor; got none: add account=VALUE"),
    (["run", "--clster", "local"], "--clster must be an option listed by --help; got --clster local; did you mean --cluster?"),
    (["other"], "task must define probed and probe to have its runs scored later; got tests.support.site_task"),
]


@pytest.mark.parametrize(("words", "message"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_wrong_use_is_one_line(words: list[str], message: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, overrides in {
        "begun": [*SMALL, f"data.root={tree}"],
        "run": [*SMALL, f"data.root={tree}"],
        "other": ["task=tests.support.site_task"],
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
