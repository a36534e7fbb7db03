"""What counts as a class and as an image, and what is left out, in a tree and when it is packed."""

import os
from pathlib import Path

import pytest
from PIL import Image

from cnnjepa.data import pack
from cnnjepa.data.datasets import load_splits
from cnnjepa.data.sources import classes_in, files_of, tree_of
from cnnjepa.data_config import DataConfig, DatasetName

HELPERS = (".ipynb_checkpoints", ".hidden", "__MACOSX", "@eaDir")


def image(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (colour, colour, colour)).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for split, count in (("train", 12), ("val", 4)):
        for label, name in enumerate(("ant", "bee")):
            for number in range(count):
                image(root / split / name / f"{number:02}.png", 100 * label + number)
    return root


def config(root: Path) -> DataConfig:
    return DataConfig(name=DatasetName.imagefolder, root=str(root), holdout_fraction=0.2)


@pytest.mark.parametrize("helper", HELPERS)
def test_a_helper_folder_is_no_class_and_holds_no_image(helper: str, tree: Path) -> None:
    before = load_splits(config(tree)).dataset
    for split in ("train", "val"):
        image(tree / split / helper / "0.png")
        image(tree / split / "ant" / helper / "0.png")
    after = load_splits(config(tree)).dataset
    assert (after.classes, len(after.train), len(after.test)) == (before.classes, len(before.train), len(before.test)) == (2, 24, 8)


def test_what_is_left_out_is_counted_by_its_reason(tree: Path) -> None:
    folder = tree / "train" / "ant"
    for name in ("._00.png", ".DS_Store", "Thumbs.db", "notes.txt", "list.TXT", "README"):
        (folder / name).write_text("x")
    found = files_of(tree / "train", ["ant", "bee"], "data.root")
    assert len(found.samples) == 24
    assert found.left_out == {"hidden or a helper of another program": 2, ".db": 1, ".txt": 2, "no extension": 1}


def test_packing_says_what_it_leaves_out(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "train" / "bee" / "notes.txt").write_text("x")
    (tree / "val" / "bee" / "._1.png").write_text("x")
    monkeypatch.setattr("sys.argv", ["pack", str(tree), str(tmp_path / "packed"), "--workers", "1"])
    assert pack.main() == 0
    said = capsys.readouterr().out
    assert "left out: 1 .txt, 1 hidden or a helper of another program\n" in said
    assert "24 training and 8 validation images of 2 classes" in said


def test_the_order_is_that_of_torchvision(tree: Path) -> None:
    from torchvision.datasets import ImageFolder

    for name in ("z/1.png", "a b/1.png", "a/2.png", "00/1.png", "00.png", "B.PNG", "a.jpeg"):
        image(tree / "train" / "ant" / name)
    assert files_of(tree / "train", ["ant", "bee"], "data.root").samples == ImageFolder(str(tree / "train")).samples


@pytest.mark.parametrize("name", ["val", "test", "valid", "validation"])
def test_the_usual_names_of_the_validation_folder_are_understood(name: str, tree: Path) -> None:
    (tree / "val").rename(tree / name)
    assert tree_of(tree, "data.root", "images", None, "") == (tree / "train", tree / name, ["ant", "bee"])


def test_no_validation_folder_is_refused_with_the_names_that_it_may_have(tree: Path) -> None:
    (tree / "val").rename(tree / "dev")
    with pytest.raises(ValueError, match=r"data\.root must hold images as .* \(or test, valid, validation\); got "):
        tree_of(tree, "data.root", "images", None, "")


def test_classes_that_only_validation_has_are_named(tree: Path) -> None:
    image(tree / "val" / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"data\.root must hold the same classes in train and val; got cat only in "):
        load_splits(config(tree))
    assert classes_in(tree / "val") == ["ant", "bee", "cat"]


@pytest.mark.parametrize("where", ["train", "val"])
def test_a_link_that_leads_nowhere_is_named_before_training(where: str, tree: Path) -> None:
    (tree / where / "bee" / "00.png").unlink()
    (tree / where / "bee" / "00.png").symlink_to(tree / "gone.png")
    with pytest.raises(ValueError, match=rf"data\.root must hold no link that leads nowhere; got .*{where}/bee/00\.png -> .*gone\.png"):
        load_splits(config(tree))


def test_a_name_that_is_not_utf_8_is_named_before_training(tree: Path) -> None:
    path = os.fsencode(tree / "train" / "bee") + b"/caf\xe9.png"
    with open(path, "wb") as file:
        file.write((tree / "train" / "bee" / "00.png").read_bytes())
    with pytest.raises(ValueError, match=r"data\.root must hold names in UTF-8; got .*caf\\xe9\.png.*: rename it"):
        load_splits(config(tree))


def test_a_link_to_a_folder_of_images_is_followed(tree: Path, tmp_path: Path) -> None:
    image(tmp_path / "elsewhere" / "1.png")
    (tree / "train" / "bee" / "more").symlink_to(tmp_path / "elsewhere")
    assert len(files_of(tree / "train", ["ant", "bee"], "data.root").samples) == 25


def test_a_class_without_an_image_is_named(tree: Path) -> None:
    for path in (tree / "val" / "bee").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(ValueError, match=r"data\.root must hold at least one image per class; got none in .*val/bee"):
        load_splits(config(tree))
