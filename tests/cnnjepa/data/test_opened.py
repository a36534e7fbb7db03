"""The look at all probe images before training."""

from pathlib import Path

import numpy as np
import pytest

from cnnjepa.data import opened
from cnnjepa.data.datasets import load_splits
from cnnjepa.data.packed import PackedImages
from cnnjepa.run.folder import RunStatus
from jobs import pretrain
from jobs.config import compose_job
from jobs.run import run_job
from tests.support import packing
from tests.support.images import image_tree
from tests.support.scored import BAD, CLASSES, SMALL, called, damage, trained


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path / "tree", CLASSES, images=16)


@pytest.mark.parametrize("how", ["empty", "truncated", "text"])
@pytest.mark.parametrize("name", [BAD, "train/ant/5.jpg"])
def test_a_damaged_image_is_found_before_training(tree: Path, tmp_path: Path, how: str, name: str) -> None:
    damage(tree / name, how)
    status, out, err = called(pretrain.main, *SMALL, f"data.root={tree}", f"run_dir={tmp_path / 'run'}")
    assert (status, out) == (2, "")
    assert err.startswith(f"error: data.root must hold images that can be decoded; got {tree / name}: ")
    assert err.endswith(": repair or remove it, then run again, or let data.on_bad_image=skip leave it out\n")
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
