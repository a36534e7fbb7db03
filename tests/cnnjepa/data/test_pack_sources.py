"""What a set may be packed from: another packed set, ImageNet's files as downloaded, torchvision's sets."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision
from scipy.io import savemat

from cnnjepa.data import sources
from cnnjepa.data.datasets import load_splits
from cnnjepa.data.imagenet import classes_of
from cnnjepa.data.packed import read_manifest
from cnnjepa.data_config import DataConfig, DatasetName
from tests.support.documented import typed
from tests.support.images import image_tree, picture, pixels_of, write_idx
from tests.support.packing import contents, run


def test_imagenet100_is_picked_out_of_a_larger_packed_set(tmp_path: Path) -> None:
    classes = classes_of("imagenet100")
    tree = image_tree(tmp_path / "tree", [*classes, "n00000001"], images=1)
    assert run(tree, tmp_path / "all").returncode == 0
    assert run(tree, tmp_path / "picked", "--classes", "imagenet100").returncode == 0
    loose, *others = (load_splits(DataConfig(DatasetName.imagenet100, root=str(tmp_path / r))) for r in ("tree", "all", "picked"))
    for other in others:
        assert np.array_equal(loose.dataset.train.labels, other.dataset.train.labels)
        assert all(np.array_equal(pixels_of(loose.dataset.train, i), pixels_of(other.dataset.train, i)) for i in range(100))
    assert len(read_manifest(tmp_path / "picked").classes) == 100
    with pytest.raises(ValueError, match=r"imagenet1k's 1000 classes; got 101"):
        load_splits(DataConfig(DatasetName.imagenet1k, root=str(tmp_path / "all")))
    few = image_tree(tmp_path / "few", classes[:3], images=1)
    assert run(few, tmp_path / "three").returncode == 0
    with pytest.raises(ValueError, match="imagenet100's 100 classes; got .*three; missing: " + classes[3]):
        load_splits(DataConfig(DatasetName.imagenet100, root=str(tmp_path / "three")))


def imagenet_as_downloaded(folder: Path, classes: list[str], images: int) -> None:
    """The three files of ILSVRC2012 with few images: class tars inside a tar, a flat tar, and the devkit with its own class numbers."""

    def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))

    def jpeg(seed: int) -> bytes:
        file = io.BytesIO()
        picture(40, 36, seed).save(file, "JPEG")
        return file.getvalue()

    folder.mkdir()
    numbers = {wnid: len(classes) - i for i, wnid in enumerate(classes)}  # in another order than the ids
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for c, wnid in reversed(list(enumerate(classes))):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for i in reversed(range(images)):
                    add(archive, f"{wnid}_{i}.JPEG", jpeg(100 * c + i))
            add(outer, f"{wnid}.tar", inner.getvalue())
    truth = [i % len(classes) for i in range(images * len(classes))]
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as flat:
        for i in reversed(range(len(truth))):  # their names count, and not their order
            add(flat, f"ILSVRC2012_val_{i + 1:08}.JPEG", jpeg(1000 + i))
    kinds = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "i4")]
    rows = [(numbers[wnid], wnid, "word", "gloss", 0) for wnid in classes] + [(1001, "n99999999", "entity", "gloss", 3)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kinds)[:, None]})
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as devkit:
        add(devkit, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        lines = "".join(f"{numbers[classes[t]]}\n" for t in truth)
        add(devkit, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", lines.encode())


def unpacked(downloaded: Path, tree: Path, classes: list[str], images: int) -> Path:
    """The tree that one makes of it by hand."""
    for wnid in classes:
        (tree / "train" / wnid).mkdir(parents=True)
        (tree / "val" / wnid).mkdir(parents=True)
    with tarfile.open(downloaded / "ILSVRC2012_img_train.tar") as outer:
        for member in outer:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                inner.extractall(tree / "train" / Path(member.name).stem, filter="data")
    with tarfile.open(downloaded / "ILSVRC2012_img_val.tar") as flat:
        for member in flat:
            number = int(Path(member.name).stem.removeprefix("ILSVRC2012_val_")) - 1
            flat.extract(member, tree / "val" / classes[number % len(classes)], filter="data")
    return tree


def test_imagenets_tar_files_give_what_their_unpacked_tree_gives(tmp_path: Path) -> None:
    classes = ["n01440764", "n01443537", "n01484850"]
    imagenet_as_downloaded(tmp_path / "down", classes, images=12)
    tree = unpacked(tmp_path / "down", tmp_path / "tree", classes, images=12)
    (tmp_path / "two.txt").write_text("n01484850\nn01440764\n")
    for name, options in (("all", []), ("two", ["--classes", tmp_path / "two.txt"])):
        for source in ("down", "tree"):
            done = run(tmp_path / source, tmp_path / f"{source}-{name}", *options)
            assert done.returncode == 0, done.stderr
        assert contents(tmp_path / f"down-{name}") == contents(tmp_path / f"tree-{name}")
    assert tree.is_dir()
    (tmp_path / "down" / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert "without ILSVRC2012_devkit_t12.tar.gz" in run(tmp_path / "down", tmp_path / "x").stderr


def test_tar_files_that_are_cut_short_are_one_line(tmp_path: Path) -> None:
    imagenet_as_downloaded(tmp_path / "down", ["n01440764", "n01443537"], images=12)
    os.truncate(tmp_path / "down" / "ILSVRC2012_img_train.tar", 20_000)
    with pytest.raises(ValueError, match=r"SOURCE must hold ImageNet's complete tar files, as downloaded; got .*down"):
        sources.find(str(tmp_path / "down"), "", None)


def test_a_torchvision_set_is_packed_without_loss(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels = {part: random.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, n in (("train", 40), ("t10k", 20))}
    for part, images in pixels.items():
        write_idx(tmp_path / "FashionMNIST" / "raw" / f"{part}-images-idx3-ubyte", images, packed=False)
        write_idx(tmp_path / "FashionMNIST" / "raw" / f"{part}-labels-idx1-ubyte", np.arange(len(images)) % 10, packed=False)
    places = {"/scratch/fashion": str(tmp_path / "out"), "/data": str(tmp_path)}
    done = run(*typed("python -m cnnjepa.data.pack torchvision:FashionMNIST /scratch/fashion --root /data", places)[3:])
    assert done.returncode == 0, done.stderr
    splits = load_splits(DataConfig(DatasetName.imagefolder, root=str(tmp_path / "out")))
    assert splits.dataset.classes == 10
    assert np.array_equal(splits.dataset.train.labels, np.arange(40) % 10)
    assert np.array_equal(pixels_of(splits.dataset.test, 7)[:, :, 1], pixels["t10k"][7])


@pytest.mark.parametrize(("splits", "read"), [(("train", "val", "test"), "test"), (("train", "val"), "val")])
def test_a_torchvision_set_is_validated_on_its_test_split_where_it_has_one(
    splits: tuple[str, ...], read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Splitting:
        def __init__(self, root: str, split: str = "train") -> None:
            if split not in splits:
                raise ValueError(split)
            self.split = split

    monkeypatch.setattr(torchvision.datasets, "Splitting", Splitting, raising=False)
    monkeypatch.setattr(sources, "_opened", {})
    assert sources._torchvision_set("Splitting", "", "val").split == read
    assert sources._torchvision_set("Splitting", "", "train").split == "train"
