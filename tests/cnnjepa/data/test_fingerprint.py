"""A set of a user's images is told from what it was by its listing, wherever it lies and however it is stored."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnnjepa.data import fingerprint as module
from cnnjepa.data.datasets import about, divide, held_out, load_dataset, load_splits
from cnnjepa.data.fingerprint import difference, fingerprint
from cnnjepa.data_config import DataConfig, DatasetName, Verify, other_set
from tests.support.images import image_tree, picture
from tests.support.packing import run as pack


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cnnjepa" / "listings"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return image_tree(tmp_path / "tree", ["cat", "dog", "eel"], images=5)


def of(root: Path, name: DatasetName = DatasetName.imagefolder, verify: Verify = Verify.listing, fresh: bool = True) -> str:
    config = DataConfig(name, root=str(root), verify=verify)
    return fingerprint(load_dataset(config), config, fresh)


def test_it_says_how_many_images_there_are_and_how_they_were_compared(tree: Path) -> None:
    assert of(tree).startswith("15 training and 15 test images, listing ")
    assert of(tree, DatasetName.images).startswith("15 training images, listing ")
    assert of(tree, verify=Verify.full).startswith("15 training and 15 test images, content ")
    assert len(of(tree).rpartition(" ")[2]) == 16


@pytest.mark.parametrize("verify", Verify)
def test_a_moved_a_packed_and_a_rewritten_set_keep_it_and_a_shrunk_one_does_not(tree: Path, tmp_path: Path, verify: Verify) -> None:
    before = of(tree, verify=verify)
    assert pack(tree, tmp_path / "packed", "--images-per-file", 4).returncode == 0
    assert of(tmp_path / "packed", verify=verify) == before
    assert of(tmp_path / "packed", DatasetName.images, verify) == of(tree, DatasetName.images, verify)
    assert pack(tree, tmp_path / "small", "--short-side", 20).returncode == 0
    config = DataConfig(DatasetName.imagefolder, root=str(tmp_path / "small"), short_side=20, jpeg_quality=95)
    assert fingerprint(load_dataset(config), config) != before
    again = tmp_path / "again"
    for path in sorted(tree.rglob("*.jpg"), reverse=True):  # in another order on the disk
        (again / path.relative_to(tree)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, again / path.relative_to(tree))
    shutil.rmtree(tree)
    assert of(again, verify=verify) == before
    (again / "val").rename(again / "validation")
    assert of(again, verify=verify) == before


def grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def altered(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])


CHANGES = {
    "added": lambda tree: picture().save(tree / "train" / "cat" / "9.jpg"),
    "removed": lambda tree: (tree / "val" / "dog" / "3.jpg").unlink(),
    "renamed": lambda tree: (tree / "train" / "cat" / "1.jpg").rename(tree / "train" / "cat" / "11.jpg"),
    "relabelled": lambda tree: (tree / "train" / "cat" / "1.jpg").rename(tree / "train" / "dog" / "11.jpg"),
    "class renamed": lambda tree: [(tree / split / "cat").rename(tree / split / "cow") for split in ("train", "val")],
    "replaced in place by one of another size": lambda tree: grown(tree / "train" / "eel" / "0.jpg"),
    "moved to the test images": lambda tree: (tree / "train" / "cat" / "1.jpg").rename(tree / "val" / "cat" / "11.jpg"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_the_listing_changes_it(tree: Path, change: str) -> None:
    before = of(tree)
    CHANGES[change](tree)
    assert of(tree) != before


def test_only_a_full_check_sees_a_change_that_keeps_the_size(tree: Path) -> None:
    before, full = of(tree), of(tree, verify=Verify.full)
    altered(tree / "train" / "eel" / "0.jpg")
    assert of(tree) == before
    assert of(tree, verify=Verify.full) != full


def test_a_run_is_compared_as_it_was_planned_whatever_is_asked_now(tree: Path) -> None:
    for verify in Verify:
        config = DataConfig(DatasetName.imagefolder, root=str(tree), fingerprint=of(tree, verify=verify))
        for now in Verify:
            assert difference(load_dataset(config), replace(config, verify=now)) == ""
    grown(tree / "train" / "eel" / "0.jpg")
    said = difference(load_dataset(config), config)
    assert said.startswith(f"data.root must hold the images that the run was planned with, {config.fingerprint}; got 15 training and 15")
    assert difference(load_dataset(config), replace(config, fingerprint="")) == ""


def test_sizes_are_read_again_only_where_a_folder_has_changed(tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    sizes = module._sizes
    monkeypatch.setattr(module, "_sizes", lambda images: asked.append(images) or sizes(images))
    before = of(tree)
    assert len(asked) == 2  # train and val
    assert len(list(cache.iterdir())) == 1
    assert of(tree, fresh=False) == before
    assert len(asked) == 2
    grown(tree / "train" / "eel" / "0.jpg")  # in place: no folder has changed
    assert of(tree, fresh=False) == before
    (note,) = cache.iterdir()
    os.utime(note, (0, time.time() - 700))
    assert of(tree, fresh=False) != before
    assert len(asked) == 4
    assert of(tree) != before  # a resume and a planning read all sizes
    picture().save(tree / "train" / "cat" / "9.jpg")
    count = len(asked)
    assert of(tree, fresh=False).startswith("16 training")
    assert len(asked) == count + 2


def test_a_home_that_cannot_be_written_costs_only_time(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(tree)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert of(tree, fresh=False) == before


@pytest.mark.parametrize("seed", range(20))
def test_the_held_out_part_has_the_same_share_of_each_class_and_leaves_each_class_an_image(seed: int) -> None:
    random = np.random.default_rng(seed)
    counts = random.integers(1, 40, random.integers(1, 12))
    labels = random.permutation(np.repeat(np.arange(len(counts)), counts))
    fraction = float(random.uniform(0.02, 0.6))
    order = random.permutation(len(labels))
    held, rest = held_out(order, labels, fraction)
    assert sorted([*held, *rest]) == list(range(len(labels)))
    of_class = np.bincount(labels[held], minlength=len(counts))
    assert (of_class < counts).all()
    assert (np.abs(of_class - counts * fraction) < 1)[counts > 1].all()
    if (counts > 2).all():
        assert len(held) == round(len(labels) * fraction)
    # the first of each class in the given order
    for label in range(len(counts)):
        mine = [i for i in order if labels[i] == label]
        assert [i for i in held if labels[i] == label] == mine[: of_class[label]]


def test_classes_of_one_image_keep_it() -> None:
    labels = np.array([*range(20), *[20] * 10])
    held, rest = held_out(np.random.default_rng(0).permutation(30), labels, 0.5)
    assert set(labels[held]) == {20}
    assert set(labels[rest]) == set(range(21))


def test_a_planned_run_holds_out_by_class_and_one_of_0_1_as_it_did(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "tree", ["cat", "dog"], images=10)
    for split in ("train", "val"):
        for rare in ("x", "y", "z"):
            (tree / split / rare).mkdir()
            picture(seed=1).save(tree / split / rare / "0.jpg")
    config = DataConfig(DatasetName.imagefolder, root=str(tree), holdout_fraction=0.3)
    data = load_dataset(config)
    planned = divide(data, replace(config, fingerprint=fingerprint(data, config)))
    assert set(data.train.labels[planned.fit]) == set(range(5))
    old = load_splits(config)
    assert len(old.holdout) == len(planned.holdout) == 7
    assert set(data.train.labels[old.fit]) != set(range(5))
    (line,) = about(old, config)
    assert line.startswith("no training image is left for the probes of ")
    assert line.endswith("0.jpg")
    assert about(planned, config) == []


@pytest.mark.parametrize("layout", ["train/", "itself"])
def test_test_images_are_taken_from_the_others_by_class(tmp_path: Path, layout: str) -> None:
    tree = image_tree(tmp_path / "tree", ["cat", "dog"], images=10)
    shutil.rmtree(tree / "val")
    root = tree if layout == "train/" else tree / "train"
    config = DataConfig(DatasetName.imagefolder, root=str(root), holdout_fraction=0.25, val_fraction=0.2, fingerprint="planned")
    splits = load_splits(config)
    labels = splits.dataset.train.labels
    assert (len(splits.test), len(splits.holdout), len(splits.fit), len(splits.pretrain)) == (4, 4, 12, 16)
    assert not set(splits.test) & set(splits.pretrain)
    assert np.bincount(labels[splits.test]).tolist() == [2, 2]
    again = load_splits(config)
    assert splits.test.tolist() == again.test.tolist()
    assert about(splits, config) == ["data.val_fraction: 4 of the 20 images are the test images, drawn by class"]


REFUSED = {
    "no val/": (
        lambda tree: shutil.rmtree(tree / "val"),
        {},
        "data.val_fraction=0.1 takes the test images from the others, and data=images",
    ),
    "val_fraction beside val/": (
        lambda tree: None,
        {"val_fraction": 0.1},
        "data.val_fraction must be 0 for a set with test images; got 0.1 with ",
    ),
    "one class": (lambda tree: [shutil.rmtree(tree / s / c) for s in ("train", "val") for c in ("dog", "eel")], {}, "got 1: data=images"),
    "no folder": (lambda tree: shutil.rmtree(tree), {"val_fraction": 0.1}, "data.root must hold one folder per class, in train/ or itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_set_that_lacks_classes_or_test_images_is_told_what_takes_it(tree: Path, case: str) -> None:
    change, keys, said = REFUSED[case]
    change(tree)
    with pytest.raises(ValueError, match="data") as error:
        load_splits(DataConfig(DatasetName.imagefolder, root=str(tree), holdout_fraction=0.4, **keys))
    assert said in str(error.value)


@pytest.mark.parametrize("layout", ["flat", "nested", "labelled"])
def test_images_without_labels_are_taken_from_any_tree(tmp_path: Path, layout: str) -> None:
    if layout == "labelled":
        root = image_tree(tmp_path / "tree", ["cat", "dog"], images=6)
    else:
        root = tmp_path / "tree"
        for i in range(12):
            folder = root if layout == "flat" else root / f"day {i % 3}" / "camera"
            folder.mkdir(parents=True, exist_ok=True)
            picture(seed=i).save(folder / f"{i}.png")
        (root / "notes.txt").write_text("x")
    config = DataConfig(DatasetName.images, root=str(root), holdout_fraction=0.25)
    splits = load_splits(config)
    assert (len(splits.pretrain), len(splits.holdout), len(splits.fit), len(splits.test)) == (12, 3, 0, 0)
    left_out = {"labelled": f"{root / 'train'}: left out: 1 beside train/"}.get(layout, f"{root}: left out: 1 .txt")
    assert about(splits, config) == [left_out]
    assert pack(root, tmp_path / "packed", "--unlabelled", "--images-per-file", 5).returncode == 0
    packed = DataConfig(DatasetName.images, root=str(tmp_path / "packed"), holdout_fraction=0.25)
    assert fingerprint(load_dataset(packed), packed) == fingerprint(load_dataset(config), config)
    assert load_splits(packed).holdout.tolist() == splits.holdout.tolist()
    with pytest.raises(ValueError, match=r"data\.root must hold classes and test images; got .*packed with --unlabelled: use data=images"):
        load_splits(replace(packed, name=DatasetName.imagefolder))
    for path in root.rglob("*.[jp][pn]g"):
        os.unlink(path)
    with pytest.raises(ValueError, match=r"data\.root must hold images, in folders of any depth; got none below"):
        load_splits(config)


def test_the_spelling_of_the_folder_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = image_tree(tmp_path / "tree", ["cat", "dog"], images=10)
    shutil.rmtree(tree / "val")
    found = []
    monkeypatch.chdir(tree / "train")
    for root in (".", "./", str(tree / "train"), "../train"):
        config = DataConfig(DatasetName.imagefolder, root=root, val_fraction=0.2)
        found.append(fingerprint(load_dataset(config), config))
    assert len(set(found)) == 1


@pytest.mark.parametrize("name", [DatasetName.imagefolder, DatasetName.images])
def test_loose_images_are_not_said_to_be_shrunk(tree: Path, name: DatasetName) -> None:
    shutil.rmtree(tree / "val")
    config = DataConfig(name, root=str(tree), short_side=20, val_fraction=0.2 if name is DatasetName.imagefolder else 0.0)
    with pytest.raises(ValueError, match=r"data\.short_side must be 0 for images that are not packed; got 20"):
        load_dataset(config)


def test_files_beside_the_class_folders_are_counted_and_dangling_classes_named(tree: Path) -> None:
    picture().save(tree / "train" / "loose.jpg")
    (tree / "train" / "list.csv").write_text("x")
    config = DataConfig(DatasetName.imagefolder, root=str(tree), holdout_fraction=0.2)
    assert about(load_splits(config), config) == [f"{tree / 'train'}: left out: 2 beside the class folders"]
    (tree / "train" / "fox").symlink_to("/nowhere/fox")
    with pytest.raises(
        ValueError, match=r"data\.root must hold no link that leads nowhere; got .*fox -> /nowhere/fox: correct or remove it"
    ):
        load_splits(config)


def test_a_folder_that_leads_into_itself_is_named(tree: Path) -> None:
    (tree / "train" / "cat" / "again").symlink_to(tree / "train" / "cat")
    with pytest.raises(ValueError, match=r"data\.root must hold folders that can be read, and no link into itself; got .*again"):
        load_splits(DataConfig(DatasetName.imagefolder, root=str(tree), holdout_fraction=0.2))


def test_sets_of_probes_have_labels(tree: Path) -> None:
    with pytest.raises(ValueError, match=r"probes\.data must hold sets with labels; got images:/x: use imagefolder:ROOT"):
        other_set("images:/x", DataConfig())
