"""A packed set is the loose one: same images, labels and order, whatever it was packed from and however often packing was killed."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cnnjepa.data import check, pack, sources
from cnnjepa.data.datasets import load_splits
from cnnjepa.data.loader import build_plan, train_loader
from cnnjepa.data.packed import PackedImages, read_manifest
from cnnjepa.data.pictures import EncodedPicture
from cnnjepa.data.views import crop_and_flip, random_views
from cnnjepa.data_config import DataConfig, DatasetName
from cnnjepa.run.identity import signature
from cnnjepa.run.ranks import Ranks
from tests.support import forked
from tests.support.held import wait_until
from tests.support.images import image_tree, picture, pixels_of
from tests.support.packing import contents, damage, packing, run
from tests.support.tiny import tiny_config

ROOT = Path(__file__).parents[3]
# Those that look at the set which is packed once.
PACKED = pytest.mark.xdist_group("packed set")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_tree(tmp_path_factory.mktemp("tree"), ["cat", "dog", "eel"], images=20)


@pytest.fixture(scope="module")
def packed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("out") / "packed"
    done = subprocess.run(packing(tree, target, "--images-per-file", 25, "--verify"), cwd=ROOT, capture_output=True, text=True, check=True)
    assert "60 training and 60 validation images of 3 classes, 0 skipped" in done.stdout
    return target


def copy_of(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@PACKED
def test_a_packed_set_is_the_loose_one(tree: Path, packed: Path) -> None:
    loose, ours = (load_splits(DataConfig(DatasetName.imagefolder, root=str(root))) for root in (tree, packed))
    assert sorted(p.name for p in packed.iterdir()) == [
        "manifest.json",
        *(f"train-0000{i}.arrow" for i in range(3)),
        *(f"val-0000{i}.arrow" for i in range(3)),
    ]
    for split in ("train", "test"):
        a, b = getattr(loose.dataset, split), getattr(ours.dataset, split)
        assert np.array_equal(a.labels, b.labels)
        assert all(Path(a.paths[i].decode()).read_bytes() == bytes(b.encoded(i)) for i in range(60))
        assert all(np.array_equal(pixels_of(a, i), pixels_of(b, i)) for i in range(60))
    for part in ("pretrain", "fit", "holdout", "test"):
        assert np.array_equal(getattr(loose, part), getattr(ours, part))


@PACKED
def test_training_sees_the_same_pixels_from_packed_files_in_any_processes(tree: Path, packed: Path) -> None:
    def stream(root: Path, workers: int) -> list[torch.Tensor]:
        config = tiny_config(global_batch_size=16)
        config.data = DataConfig(DatasetName.imagefolder, root=str(root), workers=workers)
        splits = load_splits(config.data)
        plan = build_plan(config, len(splits.pretrain), 1)
        return [
            views[0] for views, _ in train_loader(config, splits, [crop_and_flip(config.data)], plan, Ranks(0, 1, torch.device("cpu")), 0)
        ]

    loose = stream(tree, 0)
    assert len(loose) == 6
    for workers in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(loose, stream(packed, workers), strict=True))


@PACKED
def test_the_bytes_are_not_copied_and_the_images_survive_a_spawned_process(packed: Path) -> None:
    manifest = read_manifest(packed)
    images = PackedImages(packed, manifest, "train", manifest.classes)
    assert images.encoded(3).obj is images.encoded(4).obj  # both look into the mapped file
    state = pickle.dumps(images)
    assert len(state) < 60 * 30 + 2000
    assert bytes(pickle.loads(state).encoded(59)) == bytes(images.encoded(59))  # noqa: S301


@PACKED
def test_other_tools_read_the_files(packed: Path) -> None:
    import pandas as pd

    table = pd.read_feather(packed / "train-00001.arrow")
    assert list(table.columns) == ["image", "label", "name"]
    assert table["name"][0] == "dog/13.jpg"  # file 0 holds 20 cats and 5 dogs; names are sorted as text
    assert Image.open(io.BytesIO(table["image"][0])).size == (40, 36)


@pytest.mark.slow
@PACKED
@pytest.mark.parametrize("after", [1, 3])
def test_killed_and_run_again_leaves_the_same_bytes(tree: Path, packed: Path, tmp_path: Path, after: int) -> None:
    target = tmp_path / "killed"
    words = packing(tree, target, "--images-per-file", 25)[1:]
    process = forked.start(words, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_until(f"{after} files", lambda: len(list(target.glob("*.arrow"))) >= after, lambda: process.poll() is None)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (target / "manifest.json").exists()
    kept = {p: p.stat().st_ino for p in target.glob("*.arrow") if p.with_name(f".{p.name}.json").exists()}
    (target / ".train-00002.arrow.1.tmp").write_bytes(b"what a killed worker leaves")
    with pytest.raises(ValueError, match=r"must hold a complete packed set; got .*, which is unfinished"):
        load_splits(DataConfig(DatasetName.imagefolder, root=str(target)))
    assert run(tree, target, "--images-per-file", 25).returncode == 0
    assert contents(target) == contents(packed)
    assert all(path.stat().st_ino == inode for path, inode in kept.items())


@pytest.mark.slow
def test_workers_end_with_their_parent(tree: Path, tmp_path: Path) -> None:
    words = packing(tree, tmp_path / "out", "--images-per-file", 1)[1:]
    process = forked.start(words, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_until("file", lambda: list((tmp_path / "out").glob("*.arrow")), lambda: process.poll() is None)
    process.kill()
    process.wait()

    def alone() -> bool:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    try:
        wait_until("end of its workers", alone, seconds=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_half_done_packing_is_not_continued_with_other_options_or_images(tree: Path, tmp_path: Path) -> None:
    source = sources.find(str(tree), "", None)
    pack._begin(tmp_path / "out", source, pack._identity(source, pack.Stored(), 25))
    for arguments, difference in (
        ((tree, tmp_path / "out", "--images-per-file", 24), "images_per_file 25, now 24"),
        ((tree, tmp_path / "out", "--short-side", 30, "--images-per-file", 25), "short_side 0, now 30"),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert difference in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert "TARGET must be new, empty or an unfinished packing" in run(tree, tmp_path / "other").stderr


def test_corrupt_images_are_named_and_stop_the_packing_or_are_skipped_by_request(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "tree", ["cat", "dog"], images=12)
    for name, content in (("train/cat/3.jpg", b"no image"), ("val/dog/7.jpg", (tree / "val/dog/7.jpg").read_bytes()[:400])):
        (tree / name).write_bytes(content)
    done = run(tree, tmp_path / "out")
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert [line.split(": ")[1] for line in lines[:2]] == ["train/cat/3.jpg", "val/dog/7.jpg"]
    assert "got 2 that it cannot" in lines[2]
    assert not (tmp_path / "out" / "manifest.json").exists()
    done = run(tree, tmp_path / "out", "--skip-corrupt")
    assert done.returncode == 0, done.stderr
    assert "23 training and 23 validation images of 2 classes, 2 skipped" in done.stdout
    assert read_manifest(tmp_path / "out").skipped == {"train": ["train/cat/3.jpg"], "val": ["val/dog/7.jpg"]}


def test_shrunk_images_are_another_experiment_and_say_so(tree: Path, tmp_path: Path) -> None:
    assert run(tree, tmp_path / "small", "--short-side", 30, "--quality", 80).returncode == 0
    config = tiny_config()
    config.data = DataConfig(DatasetName.imagefolder, root=str(tmp_path / "small"))
    plain = signature(config)
    with pytest.raises(ValueError, match=r"data\.short_side must be 30, as when .* was packed, because it changes pixels; got 0"):
        load_splits(config.data)
    config.data.short_side = 30
    with pytest.raises(ValueError, match=r"data\.jpeg_quality must be 80"):
        load_splits(config.data)
    config.data.jpeg_quality = 80
    assert pixels_of(load_splits(config.data).dataset.train, 0).shape == (30, 33, 3)
    assert signature(config) != plain
    config.data.root = str(tree)
    with pytest.raises(ValueError, match=r"data\.short_side must be 0 for images that are not packed; got 30"):
        load_splits(config.data)


def test_decoded_images_are_the_same_experiment(tree: Path, tmp_path: Path) -> None:
    assert run(tree, tmp_path / "raw", "--decoded", "--verify").returncode == 0
    loose, raw = (load_splits(DataConfig(DatasetName.imagefolder, root=str(r))).dataset.train for r in (tree, tmp_path / "raw"))
    assert all(np.array_equal(pixels_of(loose, i), pixels_of(raw, i)) for i in range(60))
    pixels = pixels_of(raw, 0)
    assert not pixels.flags.owndata  # it is the mapped file
    config = tiny_config()
    views = [random_views([crop_and_flip(config.data)], images.pictures([5])[0], [np.random.default_rng(3)])[0] for images in (loose, raw)]
    assert torch.equal(*views)
    assert "--decoded must be left out" in run(tree, tmp_path / "x", "--decoded", "--short-side", 9).stderr


DAMAGES = ["truncated", "missing", "another file", "manifest", "torn manifest"]


@pytest.mark.slow
@PACKED
@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_sets_are_one_line_where_the_data_is_opened(packed: Path, tmp_path: Path, how: str) -> None:
    folder = copy_of(packed, tmp_path)
    message = damage(folder, how)
    with pytest.raises(ValueError, match=r"data\.root") as caught:
        load_splits(DataConfig(DatasetName.imagefolder, root=str(folder)))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@PACKED
def test_a_wrong_checksum_is_one_line_of_the_check(packed: Path, tmp_path: Path) -> None:
    folder = copy_of(packed, tmp_path)
    with open(folder / "val-00001.arrow", "r+b") as file:
        file.seek(3000)
        byte = file.read(1)
        file.seek(3000)
        file.write(bytes([byte[0] ^ 1]))
    done = run(folder, main=check.main)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: val-00001.arrow must have the sha256 ")
    assert run(packed, folder).returncode == 1  # a finished set is verified again when it is packed again


@PACKED
def test_a_wrong_count_or_class_in_a_file_is_found_by_the_check(packed: Path) -> None:
    manifest = read_manifest(packed)
    first = manifest.files[0]
    assert check.check_file(packed, first, manifest.classes, decode=True) == []
    more = type(first)(**{**vars(first), "images": 26})
    assert check.check_file(packed, more, manifest.classes, decode=False) == [f"{first.name} must hold 26 images with a class; got 25"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none", "{tmp}/out"], "SOURCE must hold images as train/<class>/<image> and val/<class>/<image>"),
        (["torchvision:Nothing", "{tmp}/out"], "SOURCE must name a class of torchvision.datasets; got torchvision:Nothing"),
        (["torchvision:MNIST", "{tmp}/out", "--root", "{tmp}"], "--root must hold MNIST in torchvision's layout"),
        (["{tree}", "{tmp}/out", "--quality", "101"], "--quality must lie in [1, 100]"),
        (
            ["{tree}", "{tmp}/out", "--classes", "{tmp}/no.txt"],
            "--classes must be imagenet100 or imagenet100_kaggle, or a text file of class names",
        ),
        (["{tree}", "/proc/none"], "TARGET must be a folder that can be written"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], message: str, tree: Path, tmp_path: Path) -> None:
    done = run(*(a.format(tmp=tmp_path, tree=tree) for a in arguments))
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert message in line


def test_what_is_not_larger_than_asked_stays_as_it_is_and_the_rest_has_the_quality_asked_for() -> None:
    file = io.BytesIO()
    picture(40, 36, 1).save(file, "JPEG")
    data = file.getvalue()
    whole = EncodedPicture(data)
    for short_side in (0, 36, 37):
        assert pack._stored(data, whole, pack.Stored(short_side, 30)) == data
    shrunk = Image.open(io.BytesIO(pack._stored(data, whole, pack.Stored(18, 30))))
    assert shrunk.size == (20, 18)
    expected = io.BytesIO()
    Image.new("RGB", (20, 18)).save(expected, "JPEG", quality=30)
    assert shrunk.quantization == Image.open(expected).quantization  # type: ignore[attr-defined]


def test_a_packing_that_was_begun_notices_images_of_another_size(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "tree", ["cat", "dog"], images=2)
    source = sources.find(str(tree), "", None)
    pack._begin(tmp_path / "out", source, pack._identity(source, pack.Stored(), 25))
    with open(tree / "val" / "dog" / "1.jpg", "ab") as file:
        file.write(b"\0")
    done = run(tree, tmp_path / "out", "--images-per-file", 25)
    assert done.returncode == 2
    assert ": listing_sha256 " in done.stderr


def test_a_file_that_is_shorter_than_noted_is_written_again(tmp_path: Path) -> None:
    tree = image_tree(tmp_path / "tree", ["cat", "dog"], images=2)
    (part, _) = pack.plan(sources.find(str(tree), "", None), 4)
    (tmp_path / "out").mkdir()
    pack.write_part(tmp_path / "out", part, pack.Stored(), False)
    whole = (tmp_path / "out" / part.name).read_bytes()
    os.truncate(tmp_path / "out" / part.name, len(whole) - 1)
    file, _ = pack.write_part(tmp_path / "out", part, pack.Stored(), False)
    assert file is not None
    assert file.bytes == len(whole)
    assert (tmp_path / "out" / part.name).read_bytes() == whole


def test_a_packing_needs_room_for_what_it_has_yet_to_write_and_clears_what_a_kill_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sources.find(str(image_tree(tmp_path / "tree", ["cat", "dog"], images=2)), "", None)
    out, identity = tmp_path / "out", pack._identity(source, pack.Stored(), 25)
    pack._begin(out, source, identity)
    (out / ".train-00000.arrow.1.tmp").write_bytes(bytes(1000))
    missing = source.bytes() - sum(p.stat().st_size for p in out.iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=missing - 1))
    with pytest.raises(ValueError, match="TARGET must have room for "):
        pack._begin(out, source, identity)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=missing))
    pack._begin(out, source, identity)
    assert [p.name for p in out.iterdir()] == ["packing.json"]


def test_every_image_is_decoded_once_more_where_that_is_asked_for(tmp_path: Path) -> None:
    """The damage is one that a checksum made afterwards does not show."""
    folder = tmp_path / "packed"
    assert run(image_tree(tmp_path / "tree", ["cat", "dog"]), folder).returncode == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    first = PackedImages(folder, read_manifest(folder), "train", ["cat", "dog"])
    whole = (folder / "train-00000.arrow").read_bytes()
    damaged = whole.replace(bytes(first.encoded(3)), bytes(len(first.encoded(3))))
    (folder / "train-00000.arrow").write_bytes(damaged)
    manifest["files"][0]["sha256"] = hashlib.sha256(damaged).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert damaged != whole
    for command, option, arguments in ((check.main, "--decode", [folder]), (pack.main, "--verify", ["unread", folder])):
        assert run(*arguments, main=command).returncode == 0
        done = run(*arguments, option, main=command)
        assert done.returncode == 1
        assert "train-00000.arrow must hold images that can be decoded; got image 3: " in done.stderr


def test_an_image_that_ends_before_its_size_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(100))
    assert sources.read(sources.Entry("a", 3, str(tmp_path / "a.tar"), 90, 10)) == (bytes(10), 3)
    with pytest.raises(OSError, match="ends in the middle of the image"):
        sources.read(sources.Entry("a", 3, str(tmp_path / "a.tar"), 90, 11))
