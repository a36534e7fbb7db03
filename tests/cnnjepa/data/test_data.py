import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torchvision.transforms import InterpolationMode, v2

from cnnjepa.config import AugmentConfig
from cnnjepa.data.datasets import DEBIAN_FASHION, Dataset, Splits, load_splits
from cnnjepa.data.imagenet import classes_of
from cnnjepa.data.loader import build_plan, normalise, train_loader
from cnnjepa.data.pictures import Drawn
from cnnjepa.data.views import ViewSpec, crop_and_flip, draw_crop, probe_view, random_views
from cnnjepa.data_config import DATA_PRESETS, DataConfig, DatasetName, Resize
from cnnjepa.run.ranks import Ranks
from tests.support.images import image_tree, picture, pixels_of, write_idx
from tests.support.tiny import tiny_config

CPU = torch.device("cpu")


def test_digits_need_no_network_and_split_the_same_every_time() -> None:
    first, again = load_splits(DATA_PRESETS["digits"]), load_splits(DATA_PRESETS["digits"])
    assert (len(first.pretrain), len(first.fit), len(first.holdout), len(first.test)) == (1437, 1150, 287, 360)
    assert np.array_equal(first.holdout, again.holdout)
    assert not set(first.fit) & set(first.holdout)
    assert set(first.fit) | set(first.holdout) == set(first.pretrain)
    assert pixels_of(first.dataset.train, 0).shape == (8, 8, 3)


def test_digits_are_those_that_scikit_learn_loads() -> None:
    theirs, split = load_digits(), load_splits(DATA_PRESETS["digits"]).dataset
    ours = np.concatenate([split.train.pixels, split.test.pixels])  # type: ignore[attr-defined]
    pixels = (theirs.images * (255 / 16)).round().astype(np.uint8)
    seen = {(label, image.tobytes()) for label, image in zip(theirs.target.tolist(), pixels, strict=True)}
    labels = np.concatenate([split.train.labels, split.test.labels]).tolist()
    assert {(label, image.tobytes()) for label, image in zip(labels, ours, strict=True)} == seen
    assert len(ours) == len(pixels)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", ""])
def test_fashion_mnist_is_read_in_torchvisions_and_debians_layout(tmp_path: Path, folder: str, packed: bool) -> None:
    random = np.random.default_rng(0)
    pixels = {part: random.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, n in (("train", 40), ("t10k", 20))}
    for part, images in pixels.items():
        write_idx(tmp_path / folder / f"{part}-images-idx3-ubyte", images, packed)
        write_idx(tmp_path / folder / f"{part}-labels-idx1-ubyte", np.arange(len(images)) % 10, packed)
    splits = load_splits(DataConfig(DatasetName.fashion_mnist, root=str(tmp_path)))
    assert np.array_equal(pixels_of(splits.dataset.test, 3)[:, :, 0], pixels["t10k"][3])
    assert splits.dataset.train.labels[13] == 3


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist_is_found_by_itself() -> None:
    splits = load_splits(DATA_PRESETS["fashion_mnist"])
    assert (len(splits.pretrain), len(splits.test), splits.dataset.classes) == (60000, 10000, 10)
    counts, values = np.bincount(splits.dataset.train.pixels.ravel(), minlength=256), np.arange(256) / 255  # type: ignore[attr-defined]
    mean = float(counts @ values / counts.sum())
    std = float(counts @ (values - mean) ** 2 / counts.sum()) ** 0.5
    assert splits.dataset.mean == (round(mean, 3),) * 3 == (0.286,) * 3
    assert splits.dataset.std == (round(std, 3),) * 3 == (0.353,) * 3


def test_normalised_digits_have_mean_0_and_deviation_1() -> None:
    splits = load_splits(DATA_PRESETS["digits"])
    images = torch.stack([probe_view(DATA_PRESETS["digits"], p) for p in splits.dataset.train.pictures(list(range(500)))])
    values = normalise(images, splits, CPU, torch.float64)
    assert float(values.mean()) == pytest.approx(0, abs=0.05)
    assert float(values.std()) == pytest.approx(1, abs=0.05)


def test_the_statistics_of_digits_are_those_of_its_training_images() -> None:
    """The mean as they come, the deviation at the 32 pixels that networks see, which is less."""
    dataset = load_splits(DATA_PRESETS["digits"]).dataset
    pixels = dataset.train.pixels  # type: ignore[attr-defined]
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert dataset.mean == (round(float(pixels.mean()) / 255, 3),) * 3 == (0.305,) * 3
    shown = torch.stack([probe_view(DATA_PRESETS["digits"], p) for p in dataset.train.pictures(list(range(len(pixels))))])
    assert dataset.std == (round(float(shown.double().std(unbiased=False)) / 255, 3),) * 3 == (0.349,) * 3


def test_the_statistics_of_colour_images_are_the_published_ones_of_imagenet(tmp_path: Path) -> None:
    """As torchvision's and timm's weights were trained with: whoever exports an encoder counts on them."""
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    published = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (weights.mean, weights.std) == published
    image_tree(tmp_path, classes_of("imagenet100"), images=1)
    for name, changes in ((DatasetName.imagefolder, {"holdout_fraction": 0.1}), (DatasetName.imagenet100, {})):
        dataset = load_splits(DataConfig(name, root=str(tmp_path), **changes)).dataset
        assert (list(dataset.mean), list(dataset.std)) == published


def test_pixels_are_normalised_channel_by_channel() -> None:
    dataset = Dataset(None, None, 2, (0.1, 0.2, 0.4), (0.5, 0.25, 2.0))  # type: ignore[arg-type]
    empty = np.zeros(0, np.int64)
    pixels = torch.tensor([[[[0, 51]], [[102, 255]], [[204, 0]]]], dtype=torch.uint8)
    values = normalise(pixels, Splits(dataset, empty, empty, empty, empty), CPU, torch.float64)
    expected = [[[-0.2, 0.2]], [[0.8, 3.2]], [[0.2, -0.2]]]
    torch.testing.assert_close(values[0], torch.tensor(expected, dtype=torch.float64))


def test_an_image_folder_is_read(tmp_path: Path) -> None:
    splits = load_splits(DataConfig(DatasetName.imagefolder, root=str(image_tree(tmp_path, ["cat", "dog", "eel"], images=8))))
    assert (len(splits.pretrain), len(splits.test), splits.dataset.classes) == (24, 24, 3)
    assert pixels_of(splits.dataset.train, 0).shape == (36, 40, 3)


def test_imagenet100_takes_its_classes_out_of_a_larger_tree(tmp_path: Path) -> None:
    classes = classes_of("imagenet100")
    assert len(set(classes)) == 100
    image_tree(tmp_path, [*classes, "n00000001"], images=1)
    splits = load_splits(DataConfig(DatasetName.imagenet100, root=str(tmp_path)))
    assert splits.dataset.classes == 100
    assert len(splits.pretrain) == 100
    assert not any(b"n00000001" in p for p in splits.dataset.train.paths)  # type: ignore[attr-defined]


def test_missing_data_says_what_is_expected_where_and_how_to_get_it(tmp_path: Path) -> None:
    expected = {
        DatasetName.fashion_mnist: "apt-get install dataset-fashion-mnist",
        DatasetName.imagefolder: r"train/<class>/<image> and val/<class>/<image> \(or .*\); got .*; to get it: sort your images",
        DatasetName.imagenet100: "download ILSVRC2012",
        DatasetName.imagenet1k: "download ILSVRC2012",
    }
    for name, message in expected.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_splits(DataConfig(name, root=str(tmp_path / "none")))
        assert str(caught.value).startswith("data.root must hold ")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"data\.root is empty"):
        load_splits(DataConfig(DatasetName.imagenet1k))
    image_tree(tmp_path / "few", classes_of("imagenet100")[:3])
    with pytest.raises(ValueError, match="one folder per class, 100 of them"):
        load_splits(DataConfig(DatasetName.imagenet100, root=str(tmp_path / "few")))
    with pytest.raises(ValueError, match="imagenet1k's 1000 classes; got 3"):
        load_splits(DataConfig(DatasetName.imagenet1k, root=str(tmp_path / "few")))


def test_gaps_in_a_data_set_are_said(tmp_path: Path) -> None:
    (image_tree(tmp_path / "tree", ["cat", "dog"]) / "train" / "eel").mkdir()
    (tmp_path / "tree" / "val" / "eel").mkdir()
    with pytest.raises(ValueError, match=r"data\.root must hold at least one image per class; got .*eel"):
        load_splits(DataConfig(DatasetName.imagefolder, root=str(tmp_path / "tree")))
    write_idx(tmp_path / "fashion" / "train-images-idx3-ubyte", np.zeros((3, 28, 28)), packed=False)
    with pytest.raises(ValueError, match="must hold fashion_mnist's train-labels-idx1-ubyte"):
        load_splits(DataConfig(DatasetName.fashion_mnist, root=str(tmp_path / "fashion")))


def test_a_single_class_serves_no_probe(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 classes in its training images for the probes; got 1"):
        load_splits(DataConfig(DatasetName.imagefolder, root=str(image_tree(tmp_path, ["cat"], images=20))))


def test_crops_and_flips_are_torchvisions_on_the_same_parameters() -> None:
    """Bit for bit on tensors; on Pillow's images within 1, but for 2 in 1 of 10,000 values at sharp edges."""
    image, spec = picture(500, 375), ViewSpec(224, 0.2, 1.0)
    whole = v2.functional.pil_to_tensor(image)
    for seed in range(20):
        (view,) = random_views([spec], Drawn(np.array(image)), [np.random.default_rng(seed)])
        crop = draw_crop(spec, 375, 500, np.random.default_rng(seed))
        theirs, pillows = (
            v2.functional.horizontal_flip(v2.functional.resized_crop(i, *crop, [224, 224], InterpolationMode.BICUBIC, antialias=True))
            for i in (whole, image)
        )
        assert torch.equal(view, theirs)
        off = (view.int() - v2.functional.pil_to_tensor(pillows).int()).abs()
        assert off.max() <= 2
        assert (off > 1).float().mean() <= 1e-4


def test_crop_areas_and_aspects_have_the_distribution_of_random_resized_crop() -> None:
    spec, random = ViewSpec(224, 0.2, 0.5), np.random.default_rng(0)
    ours = np.array([draw_crop(spec, 375, 500, random) for _ in range(4000)])
    torch.manual_seed(0)
    empty = torch.empty(3, 375, 500)
    crop = v2.RandomResizedCrop(224, scale=(0.2, 1.0))
    drawn = [crop.make_params([empty]) for _ in range(4000)]
    theirs = np.array([[d[k] for k in ("top", "left", "height", "width")] for d in drawn])
    for of in (lambda c: c[:, 2] * c[:, 3], lambda c: np.log(c[:, 3] / c[:, 2]), lambda c: c[:, 0] + c[:, 2] / 2):
        a, b = of(ours), of(theirs)
        assert abs(a.mean() - b.mean()) < 5 * (a.var() / 4000 + b.var() / 4000) ** 0.5
        assert a.std() == pytest.approx(b.std(), rel=0.06)


def test_an_image_too_narrow_for_any_crop_gives_its_centre() -> None:
    assert draw_crop(ViewSpec(32, 0.99, 0.0), 10, 1000, np.random.default_rng(0)) == (0, 493, 10, 13)


def test_crops_reach_every_edge() -> None:
    """Of 10 x 11 pixels the only square crop of their area has a side of 10, and 2 places."""
    spec, random = ViewSpec(32, 1.0, 0.0, 1.0, 1.0), np.random.default_rng(0)
    assert {draw_crop(spec, 11, 10, random) for _ in range(40)} == {(0, 0, 10, 10), (1, 0, 10, 10)}
    assert {draw_crop(spec, 10, 11, random) for _ in range(40)} == {(0, 0, 10, 10), (0, 1, 10, 10)}


def test_a_crop_that_does_not_fit_is_drawn_again() -> None:
    """An area a of a square fits where the aspect lies within a and 1/a. Of a in [0.9, 1] and aspects of log at most log(4/3) that is

    0.0517 / 0.288 = 0.18 of all draws; after n draws that do not fit the crop is the whole, in 200 * 0.82**n cases.
    """
    spec, random = ViewSpec(32, 0.9, 0.0), np.random.default_rng(0)
    found = [draw_crop(spec, 1000, 1000, random) for _ in range(200)]
    assert 10 <= sum(crop == (0, 0, 1000, 1000) for crop in found) <= 50  # 27 after ten draws, 164 after one


def test_the_short_side_of_a_probes_view_is_rounded() -> None:
    pixels = torch.from_numpy(np.array(picture(200, 150))).permute(2, 0, 1)
    resized = v2.functional.resize(pixels, [110], InterpolationMode.BICUBIC, antialias=True)  # 96 / 0.875 = 109.7
    expected = v2.functional.center_crop(resized, [96, 96])
    assert torch.equal(probe_view(DataConfig(image_size=96), Drawn(np.array(picture(200, 150)))), expected)


def test_the_probe_sees_224_of_256() -> None:
    view = probe_view(DataConfig(image_size=224), Drawn(np.array(picture(500, 375))))
    transform = v2.Compose([v2.Resize(256, InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    assert (view.int() - v2.functional.pil_to_tensor(transform(picture(500, 375))).int()).abs().max() <= 1


@pytest.mark.parametrize("resize", Resize)
@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (257, 256), (8, 8), (31, 77), (256, 256)])
def test_the_probe_sees_torchvisions_pixels(width: int, height: int, resize: Resize) -> None:
    pixels = torch.from_numpy(np.array(picture(width, height))).permute(2, 0, 1)
    expected = v2.functional.center_crop(v2.functional.resize(pixels, [256], InterpolationMode(resize.value), antialias=True), [224, 224])
    assert torch.equal(probe_view(DataConfig(image_size=224, probe_resize=resize), Drawn(np.array(picture(width, height)))), expected)


def test_the_parts_of_a_set_are_those_of_the_runs_made_so_far() -> None:
    """Whoever changes which images are held out changes what every choice before was made on."""
    splits = load_splits(replace(DATA_PRESETS["digits"], train_limit=300, test_limit=50, holdout_fraction=0.1))
    parts = (splits.pretrain, splits.fit, splits.holdout, splits.test)
    assert [len(part) for part in parts] == [300, 270, 30, 50]
    assert all((np.diff(part) > 0).all() for part in parts)
    text = hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in parts))
    for images in (splits.dataset.train, splits.dataset.test):
        text.update(images.pixels.tobytes() + images.labels.astype("<i8").tobytes())  # type: ignore[attr-defined]
    assert text.hexdigest()[:16] == "6b204ffe3bd05464"


def test_the_loader_gives_the_labels_of_what_may_be_fitted_and_hides_those_that_are_held_out() -> None:
    config = tiny_config(epochs=1)
    splits = load_splits(config.data)
    plan = build_plan(config, len(splits.pretrain), 1)
    given = torch.cat([labels for _, labels in train_loader(config, splits, [], plan, Ranks(0, 1, CPU), 0)]).tolist()
    shown = [int(splits.pretrain[i]) for i in plan.order(0)]
    held = set(splits.holdout.tolist())
    assert len(held & set(shown)) == 32
    assert given == [-1 if i in held else int(splits.dataset.train.labels[i]) for i in shown]


def test_the_sets_are_cut_and_mirrored_as_listed() -> None:
    """The preset of each set; the paper's for ImageNet: crops from a fifth of the area, flips, probes of 224 of 256 pixels."""
    table = {
        name: (d.image_size, d.min_crop_scale, d.flip_probability, d.eval_crop_fraction, d.holdout_fraction)
        for name, d in DATA_PRESETS.items()
    }
    assert table == {
        "digits": (32, 0.5, 0.0, 1.0, 0.2),
        "fashion_mnist": (32, 0.2, 0.5, 1.0, 0.1),
        "imagefolder": (224, 0.2, 0.5, 0.875, 0.1),
        "images": (224, 0.2, 0.5, 0.875, 0.1),
        "imagenet100": (224, 0.2, 0.5, 0.875, 0.05),
        "imagenet100_kaggle": (224, 0.2, 0.5, 0.875, 0.05),
        "imagenet1k": (224, 0.2, 0.5, 0.875, 0.02),
    }
    for d in DATA_PRESETS.values():
        assert crop_and_flip(d) == ViewSpec(d.image_size, d.min_crop_scale, d.flip_probability, 3 / 4, 4 / 3)


def test_an_image_too_high_for_any_crop_gives_its_centre_too() -> None:
    assert draw_crop(ViewSpec(32, 0.99, 0.0), 1000, 12, np.random.default_rng(0)) == (492, 0, 16, 12)


def test_a_strength_above_1_never_inverts_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors of 1 - 1.5 to 1 + 1.5 are cut at 0, as torchvision does it."""
    found: list[float] = []
    monkeypatch.setattr(v2.functional, "adjust_contrast", lambda image, factor: (found.append(factor), image)[1])
    augment = AugmentConfig(jitter_probability=1.0, contrast=1.5)
    for seed in range(60):
        random_views([ViewSpec(8, 1.0, 0.0, augment=augment)], Drawn(np.array(picture(16, 16))), [np.random.default_rng(seed)])
    assert len(found) == 60
    assert 0 <= min(found) < 0.2
    assert 2.3 < max(found) <= 2.5
