"""Images without labels pretrain; what needs labels is left out and said, or runs on other sets."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cnnjepa.run.folder import RunFolder
from cnnjepa.run.scores import is_lacking
from jobs import pretrain
from jobs.config import compose_job
from jobs.task import task_of
from tests.support.images import image_tree, picture

SMALL = [
    "encoder.width=8",
    "data.image_size=32",
    "epochs=1",
    "optimizer.warmup_epochs=0",
    "global_batch_size=8",
    "micro_batch_size=8",
    "data.holdout_fraction=0.25",
    "log.tensorboard=false",
    "probes.linear_paper_epochs=2",
]


def flat(root: Path) -> Path:
    root.mkdir()
    for i in range(24):
        picture(40, 36, seed=i).save(root / f"{i}.png")
    return root


def nested(root: Path) -> Path:
    for i in range(24):
        folder = root / f"camera {i % 2}" / f"2026-{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(40, 36, seed=i).save(folder / f"{i}.jpg")
    return root


def labelled(root: Path) -> Path:
    return image_tree(root, ["cat", "dog"], images=12)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("made", [flat, nested, labelled])
def test_any_tree_pretrains_and_only_what_needs_no_labels_is_probed(
    made: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = compose_job([*SMALL, "data=images", f"data.root={made(tmp_path / 'tree')}", f"run_dir={tmp_path / 'run'}"])
    assert pretrain.run(job) == 0
    assert "data=images has no labels, and linear and knn need some: probes.data=[NAME:ROOT] names a set" in capsys.readouterr().out
    result = RunFolder(tmp_path / "run").result()
    assert result is not None
    assert sorted(result.metrics) == ["collapse.feature_std", "collapse.rankme"]
    assert result.missing == {}
    own = RunFolder(tmp_path / "run").config()
    assert not [p for p in task_of(own).probed(own, own) if is_lacking(RunFolder(tmp_path / "run"), result, p)]


def test_probes_run_on_other_sets_that_have_labels(tmp_path: Path) -> None:
    own, other = flat(tmp_path / "tree"), image_tree(tmp_path / "labelled", ["cat", "dog"], images=12)
    words = ["data=images", f"data.root={own}", f"probes.data=[imagefolder:{other}]", f"run_dir={tmp_path / 'run'}"]
    assert pretrain.run(compose_job([*SMALL, *words])) == 0
    result = RunFolder(tmp_path / "run").result()
    assert result is not None
    assert {"linear.imagefolder.test_top1", "knn.imagefolder.test_top1", "collapse.rankme"} <= result.metrics.keys()
    assert not any(name.startswith(("linear.test", "knn.test")) for name in result.metrics)


def test_supervised_training_is_refused_and_so_is_a_folder_without_images(tmp_path: Path) -> None:
    tree = flat(tmp_path / "tree")
    with pytest.raises(ValueError, match="method must be one that needs no labels with data=images; got supervised"):
        compose_job([*SMALL, "data=images", f"data.root={tree}", "method=supervised", "method.classes=2"])
    with pytest.raises(ValueError, match=r"data\.val_fraction must be 0 with any set but imagefolder; got 0\.1"):
        compose_job([*SMALL, "data=images", f"data.root={tree}", "data.val_fraction=0.1"])
    shutil.rmtree(tree)
    tree.mkdir()
    (tree / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"data\.root must hold images, in folders of any depth; got none below"):
        pretrain.run(compose_job([*SMALL, "data=images", f"data.root={tree}", f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run" / "checkpoints").exists()
