"""Images that cannot be decoded are left out, listed and counted where data.on_bad_image=skip asks for it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cnnjepa.config import TrainConfig
from cnnjepa.data import opened, skipped
from cnnjepa.data.datasets import load_splits
from cnnjepa.run.folder import HopelessError, RunFolder, RunStatus
from cnnjepa.run.identity import signature
from cnnjepa.train import train
from jobs import pretrain
from jobs.config import compose_job
from jobs.run import run_job
from sweeps.report.status import skipped_lines, sweep_status
from sweeps.spec.sweep import Configuration, Scale, ScaleName, SweepSpec, build_trials
from sweeps.state.folder import Sweep
from sweeps.state.view import View
from tests.cnnjepa.data.test_faults import ALONE, damaged_pack, on_two_ranks
from tests.support.images import image_tree
from tests.support.runs import assert_bitwise_equal, comparable, final_state
from tests.support.scored import CLASSES, SMALL, called, damage, result_of, score

BAD = {"train/ant/5.jpg": "truncated", "train/bee/9.jpg": "empty", "val/cat/3.jpg": "text"}
SKIP = [*SMALL, "data.on_bad_image=skip", "probes.names=[knn]"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = image_tree(tmp_path / "tree", CLASSES, images=16)
    for name, how in BAD.items():
        shutil.copy(root / name, tmp_path / f"whole-{Path(name).name}")
        damage(root / name, how)
    return root


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The indices that are decoded to look for damage, with no memory of earlier looks."""
    seen: list[int] = []
    monkeypatch.setattr(opened.tempfile, "gettempdir", lambda: str(tmp_path))
    damaged = opened.damaged
    monkeypatch.setattr(opened, "damaged", lambda images, chunk: seen.extend(map(int, chunk)) or damaged(images, chunk))
    return seen


def config_of(root: Path, *words: str) -> TrainConfig:
    found: TrainConfig = compose_job([*SKIP, f"data.root={root}", *words]).train
    return found


def folder_of(path: Path, config: TrainConfig) -> RunFolder:
    folder = RunFolder(path)
    folder.prepare(config)
    return folder


def listed(path: Path) -> list[str]:
    return [one["name"] for one in json.loads((path / "skipped.json").read_text())["skipped"]]


def test_a_run_leaves_out_what_cannot_be_decoded(tree: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    status, out, err = called(pretrain.main, *SKIP, f"data.root={tree}", f"run_dir={run}")
    assert status == 0, err
    result = result_of(run)
    assert result.skipped_images == 3
    assert listed(run) == list(BAD)
    found = json.loads((run / "skipped.json").read_text())
    assert found["looked_at"] == 96
    assert found["skipped"][1] == {"split": "train", "index": 31, "name": "train/bee/9.jpg", "cause": "no image in its 0 bytes"}
    assert result.images["knn.test_top1"] == 47
    assert f"3 images cannot be decoded and are left out: {run / 'skipped.json'}" in out
    splits = load_splits(config_of(tree).data)
    used = skipped.without_listed(splits, config_of(tree).data, RunFolder(run))
    assert result.images["knn.holdout_top1"] == len(used.holdout)
    assert set(splits.pretrain) - set(used.pretrain) == {11, 31}
    assert not {11, 31} & set(np.concatenate([used.fit, used.holdout]))
    assert set(splits.test) - set(used.test) == {41}
    assert len(used.fit) + len(used.holdout) == len(used.pretrain) == 46


def test_a_resume_and_later_scores_read_the_list_and_end_as_one_run(tree: Path, tmp_path: Path, decoded: list[int]) -> None:
    config = config_of(tree)
    train(config, folder_of(tmp_path / "whole", config))
    assert sorted(decoded) == sorted([*range(48)] * 2)
    folder = folder_of(tmp_path / "parts", config)
    assert train(config, folder, lambda: True) is None
    for name in BAD:  # what can be decoded again stays left out
        shutil.copy(tmp_path / f"whole-{Path(name).name}", tree / name)
    decoded.clear()
    result = train(config, folder)
    assert result is not None
    assert (result.resumes, result.skipped_images) == (1, 3)
    assert comparable(tmp_path / "whole")[1] | {"resumes": 0} == comparable(tmp_path / "parts")[1] | {"resumes": 0}
    assert_bitwise_equal(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
    status, out, err = score(tmp_path / "parts", "probes.names=[collapse]")
    assert (status, err) == (0, "")
    assert "collapse.rankme" in out
    assert decoded == []
    (tmp_path / "parts" / "skipped.json").unlink()
    status, out, _ = score(tmp_path / "parts", "probes.names=[linear]")
    assert status == 1
    assert "not scored: skipped.json must be in the folder of a run with data.on_bad_image=skip" in out


@pytest.mark.slow
def test_two_ranks_leave_out_the_same(tree: Path, tmp_path: Path) -> None:
    statuses, said = on_two_ranks(tmp_path / "run", f"data.root={tree}", "data.on_bad_image=skip", "probes.names=[knn]")
    assert statuses == [0, 0], said
    assert listed(tmp_path / "run") == list(BAD)
    assert (result_of(tmp_path / "run").skipped_images, result_of(tmp_path / "run").images["knn.test_top1"]) == (3, 47)


def test_a_packed_set_and_its_copy_elsewhere(tmp_path: Path) -> None:
    root = damaged_pack(image_tree(tmp_path / "tree", CLASSES, images=16), tmp_path / "packed", "train", 25)
    config, run = config_of(root), tmp_path / "run"
    used = skipped.without_bad(load_splits(config.data), config, folder_of(run, config), ALONE)
    assert listed(run) == ["train-00000.arrow, image 25"]
    shutil.copytree(root, tmp_path / "staged")
    staged = config_of(tmp_path / "staged")
    again = skipped.without_bad(load_splits(staged.data), staged, RunFolder(run), ALONE)
    for role in ("pretrain", "fit", "holdout", "test"):
        assert np.array_equal(getattr(used, role), getattr(again, role))
    assert 25 not in again.pretrain


def test_a_whole_set_has_an_empty_list_and_one_in_memory_none(tmp_path: Path) -> None:
    root = image_tree(tmp_path / "tree", CLASSES, images=8)
    config = config_of(root)
    splits = skipped.without_bad(load_splits(config.data), config, folder_of(tmp_path / "run", config), ALONE)
    assert (listed(tmp_path / "run"), len(splits.pretrain)) == ([], 24)
    digits: TrainConfig = compose_job(["data=digits", "data.on_bad_image=skip"]).train
    held = load_splits(digits.data)
    assert skipped.without_bad(held, digits, folder_of(tmp_path / "digits", digits), ALONE) is held
    assert not (tmp_path / "digits" / "skipped.json").exists()


@pytest.mark.parametrize(("count", "is_refused"), [(9, False), (10, True)])
def test_more_than_a_tenth_is_refused(count: int, is_refused: bool, tmp_path: Path) -> None:
    root = image_tree(tmp_path / "tree", CLASSES, images=16)
    for number in range(count):
        damage(root / f"train/ant/{number}.jpg", "empty")
    config = config_of(root)
    folder = folder_of(tmp_path / "run", config)
    if not is_refused:
        assert len(skipped.without_bad(load_splits(config.data), config, folder, ALONE).pretrain) == 48 - count
        return
    result = run_job(compose_job([*SKIP, f"data.root={root}", f"run_dir={folder.path}"]))
    assert result is not None
    assert result.status is RunStatus.failed
    rule = "data.on_bad_image must be used where it leaves out at most 10 % of the images"
    first = "train/ant/0.jpg: no image in its 0 bytes"
    assert result.cause.startswith(f"DamagedImagesError: {rule}; got 10 of 96 that cannot be decoded, the first {first}: repair them")
    assert not (folder.path / "skipped.json").exists()


def emptied(path: Path) -> None:
    path.write_text("{}")


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace('"index": 11,', '"index": 12,'))


@pytest.mark.parametrize("change", [Path.unlink, emptied, edited])
def test_a_list_that_is_not_as_it_was_ends_the_run_by_name(change: Callable[[Path], None], tree: Path, tmp_path: Path) -> None:
    config = config_of(tree, "probes.names=[]")
    folder = folder_of(tmp_path / "run", config)
    assert train(config, folder, lambda: True) is None
    change(folder.path / "skipped.json")
    with pytest.raises(HopelessError, match=r"skipped\.json must"):
        train(config, folder)


def test_a_list_of_another_set_is_refused(tree: Path, tmp_path: Path) -> None:
    config = config_of(tree)
    folder = folder_of(tmp_path / "run", config)
    skipped.without_bad(load_splits(config.data), config, folder, ALONE)
    (tree / "train/ant/0.jpg").unlink()
    with pytest.raises(HopelessError, match=r"got train/ant/5\.jpg, which is not image 11 of train: restore the set"):
        skipped.without_bad(load_splits(config.data), config, folder, ALONE)


def test_what_breaks_later_stops_the_run(tree: Path, tmp_path: Path) -> None:
    def begun() -> bool:
        damage(tree / "train/cat/1.jpg", "empty")
        return False

    result = run_job(compose_job([*SKIP, f"data.root={tree}", f"run_dir={tmp_path / 'run'}", "probes.names=[]", "epochs=3"]), begun)
    assert result is not None
    assert result.status is RunStatus.failed
    assert result.cause == f"DamagedImagesError: {tree / 'train/cat/1.jpg'}: no image in its 0 bytes: repair or remove it, then run again"
    assert result.skipped_images == 3


def test_a_method_that_only_calibrates_leaves_them_out_too(tree: Path, tmp_path: Path) -> None:
    words = ["method=random", f"data.root={tree}", f"run_dir={tmp_path / 'run'}"]
    result = run_job(compose_job([*SKIP, *words]))
    assert result is not None
    assert (result.status, result.skipped_images, result.missing) == (RunStatus.completed, 3, {})


def test_an_image_is_decoded_again_only_if_it_was_damaged(tree: Path, tmp_path: Path, decoded: list[int]) -> None:
    config = config_of(tree)
    for name in ("one", "two"):
        decoded.clear()
        skipped.without_bad(load_splits(config.data), config, folder_of(tmp_path / name, config), ALONE)
    assert sorted(decoded) == [11, 31, 41]
    assert listed(tmp_path / "two") == list(BAD)


def test_the_run_id_changes_only_with_skip(tree: Path) -> None:
    stop: TrainConfig = compose_job([*SMALL, f"data.root={tree}", "data.on_bad_image=stop"]).train
    plain: TrainConfig = compose_job([*SMALL, f"data.root={tree}"]).train
    assert signature(stop) == signature(plain)
    assert signature(stop) != signature(config_of(tree, "probes.names=[linear,knn,collapse]"))


def test_status_says_how_many_are_left_out(tree: Path, tmp_path: Path) -> None:
    configurations = [Configuration({"method.predictor.depth": depth}) for depth in (1, 2, 3)]
    scale = Scale([*SKIP, f"data.root={tree}"], seeds=1)
    spec = SweepSpec("skipping", "How many?", configurations=configurations, smoke=scale, paper=scale)
    sweep = Sweep.of(spec, ScaleName.smoke, build_trials(spec, scale, 1, "local", []), tmp_path / "skipping-smoke")
    sweep.write()
    for trial in sweep.trials[:2]:
        assert run_job(
            compose_job([*SKIP, f"data.root={tree}", f"method.predictor.depth={trial.number + 1}", f"run_dir={sweep.trial_dir(trial)}"])
        )
    view = View(sweep)
    status = sweep_status(view)
    assert [t["skipped_images"] for t in status["trials"]] == [3, 3, 0]
    (line,) = skipped_lines(view, status)
    assert line == f"3 images cannot be decoded and are left out: {sweep.trial_dir(sweep.trials[0]) / 'skipped.json'}, and in 1 more runs"
