"""Images of one and of four channels, from the file to the trained network, its probes and what is refused."""

import io
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cnnjepa.config import AugmentConfig, EncoderConfig, EncoderName, TrainConfig
from cnnjepa.data import opened
from cnnjepa.data.datasets import IMAGENET_MEAN, load_splits
from cnnjepa.data.pictures import Drawn, EncodedPicture, as_grey
from cnnjepa.data.views import ViewSpec, random_views
from cnnjepa.data_config import DATA_PRESETS, DataConfig, other_set
from cnnjepa.models.encoders import build_encoder
from cnnjepa.monitoring.recorder import Recorder
from cnnjepa.rules import validate, validate_augment
from cnnjepa.run.folder import RunFolder, RunStatus
from cnnjepa.run.identity import signature
from cnnjepa.task import export
from jobs.config import compose_job
from tests.cnnjepa.methods.test_methods import small
from tests.support.images import picture, pixels_of
from tests.support.packing import run as pack
from tests.support.runs import comparable, final_state, run

STATISTICS = {1: ([0.45], [0.25]), 4: ([0.4, 0.45, 0.5, 0.3], [0.2, 0.25, 0.3, 0.35])}
NEVER = {f.name: 0.0 for f in fields(AugmentConfig) if f.name.endswith("_probability")}
BLURRED = {**NEVER, "blur_probability": 1.0}


def four_bands(width: int, height: int, seed: int, fourth: int | None = None) -> Image.Image:
    """RGB and a fourth band of its own, or one that is the same everywhere."""
    image = picture(width, height, seed)
    image.putalpha(Image.new("L", image.size, fourth) if fourth is not None else picture(width, height, 1000 + seed).getchannel("R"))
    return image


def tree(root: Path, channels: int, fourth: int | None = None) -> Path:
    """Two classes, of 12 training images each, as JPEG in RGB or as PNG of four bands."""
    for split, images in (("train", 12), ("val", 4)):
        for c, name in enumerate(("cat", "dog")):
            (folder := root / split / name).mkdir(parents=True)
            for i in range(images):
                seed = 100 * c + i + 50 * (split == "val")
                if channels == 4:
                    four_bands(40, 36, seed, fourth).save(folder / f"{i}.png")
                else:
                    picture(40, 36, seed).save(folder / f"{i}.jpg", quality=90)
    return root


def data_of(root: Path, channels: int, **more: object) -> DataConfig:
    mean, std = STATISTICS[channels]
    own = replace(DATA_PRESETS["imagefolder"], root=str(root), image_size=32, holdout_fraction=0.25, eval_crop_fraction=1.0)
    return replace(own, channels=channels, mean=mean, std=std, **more)  # type: ignore[arg-type]


def config_of(method: str, root: Path, channels: int, **more: object) -> TrainConfig:
    config = small(method)
    config.data = data_of(root, channels, **more)
    config.global_batch_size = config.micro_batch_size = 8
    config.probes.knn_k = 3
    config.probes.linear_paper_epochs = 1
    if method == "simclr":
        changed = BLURRED if channels == 4 else {**BLURRED, "jitter_probability": 0.8, "saturation": 0.0, "hue": 0.0}
        config.method.augment = AugmentConfig(**changed)  # type: ignore[attr-defined]
    validate(config)
    return config


# From end to end.


@pytest.mark.parametrize("method", ["cnn_jepa", "simclr", "ijepa"])
@pytest.mark.parametrize("channels", [1, 4])
def test_a_run_trains_and_probes_on_all_channels(method: str, channels: int, tmp_path: Path) -> None:
    config = config_of(method, tree(tmp_path / "images", channels), channels, workers=2 * (method == "simclr"))
    result = run(config, tmp_path / "run")
    assert result is not None
    assert (result.status, result.missing) == (RunStatus.completed, {})
    state = final_state(tmp_path / "run")
    first = state["method"]["encoder.patch_embed.proj.weight" if method == "ijepa" else "encoder.conv1.weight"]
    assert first.shape[1] == channels
    tensors, about = export(config, state)
    assert about["channels"] == str(channels)
    assert next(iter(tensors[k] for k in tensors if k in ("conv1.weight", "patch_embed.proj.weight"))).shape[1] == channels


def test_the_fourth_band_reaches_the_loss(tmp_path: Path) -> None:
    losses = []
    for fourth in (10, 200):
        config = config_of("cnn_jepa", tree(tmp_path / f"{fourth}", 4, fourth), 4)
        config.epochs, config.optimizer.warmup_epochs, config.probes.names = 1, 0.0, []
        run(config, tmp_path / f"run{fourth}")
        losses.append([record["loss"] for record in RunFolder(tmp_path / f"run{fourth}").metrics() if record["kind"] == "step"])
    assert len(losses[0]) == len(losses[1]) > 0
    assert losses[0] != losses[1]


@pytest.mark.parametrize("channels", [1, 4])
def test_a_packed_set_gives_the_run_of_its_folder(channels: int, tmp_path: Path) -> None:
    loose, packed = tree(tmp_path / "loose", channels), tmp_path / "packed"
    assert pack(loose, packed, "--verify").returncode == 0
    for name, root in (("a", loose), ("b", packed)):
        config = config_of("cnn_jepa", root, channels)
        config.epochs, config.optimizer.warmup_epochs = 1, 0.0
        run(config, tmp_path / name)
    (records, result), (others, other) = comparable(tmp_path / "a"), comparable(tmp_path / "b")
    assert records == others
    assert {**result, "signature": ""} == {**other, "signature": ""}


@pytest.mark.parametrize("how", [["--decoded"], ["--short-side", "24"]])
def test_one_channel_comes_from_any_packed_set_and_four_only_from_one_that_is_unchanged(how: list[str], tmp_path: Path) -> None:
    loose, packed = tree(tmp_path / "loose", 4), tmp_path / "packed"
    assert pack(loose, packed, *how).returncode == 0
    shrunk = {"short_side": 24, "jpeg_quality": 95} if "--short-side" in how else {}
    train = load_splits(data_of(packed, 1, **shrunk)).dataset.train
    assert all(pixels_of(train, i).shape[2] == 1 for i in range(len(train)))
    four = data_of(packed, 4, **shrunk)
    if shrunk:
        with pytest.raises(ValueError, match=r"data.short_side must be 0 with data.channels=4, since shrunk images are RGB; got 24"):
            validate(replace(small("cnn_jepa"), data=four))
        return
    with pytest.raises(ValueError, match=f"{packed}/.*image 0: it has 3 bands, and data.channels is 4"):
        opened.require_decodable(load_splits(four), "data.root")


@pytest.mark.parametrize("name", ["digits", "imagefolder"])
def test_the_sets_own_grey_is_one_channel(name: str, tmp_path: Path) -> None:
    if name == "digits":
        one, three = (load_splits(replace(DATA_PRESETS[name], channels=channels)).dataset for channels in (1, 3))
        assert (one.mean, one.std) == (three.mean[:1], three.std[:1])
    else:
        root = tmp_path / "grey"
        for split in ("train", "val"):
            for c in ("a", "b"):
                (root / split / c).mkdir(parents=True)
                for i in range(4):
                    picture(40, 36, i).convert("L").save(root / split / c / f"{i}.jpg")
        one = load_splits(data_of(root, 1)).dataset
        three = load_splits(replace(data_of(root, 1), channels=3, mean=[], std=[])).dataset
        assert (one.mean, three.mean) == ((0.45,), IMAGENET_MEAN)
    for i in range(3):
        assert np.array_equal(pixels_of(one.train, i), pixels_of(three.train, i)[:, :, :1])


# Pixels and views.


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("sound", [True, False])
def test_grey_is_the_same_however_a_jpeg_is_decoded(subsampling: str, sound: bool) -> None:
    file = io.BytesIO()
    picture(150, 203).save(file, "JPEG", quality=90, subsampling=subsampling)
    expected = np.array(Image.open(io.BytesIO(file.getvalue())).convert("RGB").convert("L"))[:, :, None]
    one = EncodedPicture(file.getvalue(), sound, channels=1)
    assert np.array_equal(one.pixels(), expected)
    assert np.array_equal(one.pixels(60)[:60], expected[:60])
    assert np.array_equal(one.pixels(factor=2), as_grey(EncodedPicture(file.getvalue(), sound).pixels(factor=2)))


def test_views_treat_each_channel_alike() -> None:
    """Crop, flip, resizing and blur of four channels are those of each one alone."""
    pixels = np.array(four_bands(90, 70, 3))
    spec = ViewSpec(32, 0.2, 0.5, augment=AugmentConfig(**BLURRED))
    for seed in range(6):
        whole = random_views([spec], Drawn(pixels), [np.random.default_rng(seed)])[0]
        assert whole.shape == (4, 32, 32)
        for c in range(4):
            one = random_views([spec], Drawn(pixels[:, :, c : c + 1]), [np.random.default_rng(seed)])[0]
            assert torch.equal(one, whole[c : c + 1])


def test_a_grey_view_is_brightened_and_solarised() -> None:
    grey = as_grey(np.array(picture(64, 64)))
    plain, light, inverted = (
        random_views([ViewSpec(64, 1.0, 0.0, 1.0, 1.0, AugmentConfig(**{**NEVER, **change}))], Drawn(grey), [np.random.default_rng(1)])[0]
        for change in ({}, {"jitter_probability": 1.0, "saturation": 0.0, "hue": 0.0}, {"solarise_probability": 1.0})
    )
    assert torch.equal(plain, torch.from_numpy(grey).permute(2, 0, 1))
    assert not torch.equal(plain, light)
    assert torch.equal(inverted, torch.where(plain < 128, plain, 255 - plain))


@pytest.mark.parametrize("name", [EncoderName.resnet18, EncoderName.convnext_tiny, EncoderName.vit_tiny])
@pytest.mark.parametrize("channels", [1, 4])
def test_every_encoder_reads_every_channel(name: EncoderName, channels: int) -> None:
    encoder = build_encoder(EncoderConfig(name, patch_size=32, vit_depth=1), 64, 0, channels)
    images = torch.randn(2, channels, 64, 64, requires_grad=True)
    encoder(images).square().sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().amax((0, 2, 3)) > 0).all()


def test_pictures_of_four_channels_show_the_first_three() -> None:
    told = []
    recorder = Recorder.__new__(Recorder)
    recorder._board = type("Board", (), {"tell": lambda self, *what: told.append(what)})()  # type: ignore[assignment]
    for channels in (1, 3, 4):
        recorder.pictures(1, {"view1": torch.rand(2, channels, 8, 8)})
    assert [pixels.shape[1] for *_, pixels in told] == [1, 3, 3]


# What is refused.


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("key", ["mean", "std"])
def test_image_files_of_other_channels_need_a_mean_and_a_deviation(channels: int, key: str, tmp_path: Path) -> None:
    config = config_of("cnn_jepa", tmp_path, channels)
    setattr(config.data, key, [])
    with pytest.raises(
        ValueError, match=rf"data.{key} must hold {channels} numbers?, one per channel of imagefolder, .*'data.{key}=\[0.*\]'; got \[\]"
    ):
        validate(config)


@pytest.mark.parametrize(
    ("channels", "key"),
    [
        (1, "grey_probability"),
        (1, "saturation"),
        (1, "hue"),
        (4, "jitter_probability"),
        (4, "grey_probability"),
        (4, "solarise_probability"),
    ],
)
def test_an_augmentation_of_rgb_is_refused_for_other_channels(channels: int, key: str) -> None:
    fine = {**BLURRED, "saturation": 0.0, "hue": 0.0}
    if channels == 1:
        fine |= {"jitter_probability": 0.5, "solarise_probability": 0.5}
    validate_augment(AugmentConfig(**fine), "method.view2", channels)
    changed = AugmentConfig(**{**fine, key: 0.1})
    validate_augment(changed, "method.view2", 3)
    with pytest.raises(ValueError, match=f"method.view2.{key} must be 0 with data.channels={channels}, .*; got 0.1"):
        validate_augment(changed, "method.view2", channels)


@pytest.mark.parametrize("method", ["simclr", "byol", "vicreg"])
def test_the_joint_embedding_methods_refuse_their_color_changes(method: str, tmp_path: Path) -> None:
    config = small(method)
    config.data = data_of(tmp_path, 4)
    with pytest.raises(ValueError, match=r"jitter_probability must be 0 with data.channels=4"):
        validate(config)


def test_a_check_of_three_channels_is_none_of_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened.tempfile, "gettempdir", lambda: str(tmp_path))
    root = tree(tmp_path / "images", 3)
    opened.require_decodable(load_splits(replace(data_of(root, 1), channels=3, mean=[], std=[])), "data.root")
    opened.require_decodable(load_splits(data_of(root, 1)), "data.root")
    with pytest.raises(ValueError, match=r"data.root must hold .*\.jpg: it has 3 bands, and data.channels is 4"):
        opened.require_decodable(load_splits(data_of(root, 4)), "data.root")


def test_other_sets_have_the_runs_channels_and_their_own_statistics(tmp_path: Path) -> None:
    one = data_of(tmp_path, 1)
    assert (other_set("digits", one).channels, other_set("digits", one).mean) == (1, [])
    assert other_set(f"imagefolder:{tmp_path}", one).mean == one.mean
    three = replace(one, channels=3, mean=[0.1, 0.2, 0.3], std=[0.1, 0.2, 0.3])
    assert other_set(f"imagefolder:{tmp_path}", three).mean == []
    config = config_of("cnn_jepa", tmp_path, 4)
    config.probes.data = ["digits"]
    with pytest.raises(ValueError, match=r"data.channels must be 1 or 3 with digits, whose images are grey; got 4"):
        validate(config)
    config = small("cnn_jepa")
    config.data.channels, config.probes.data = 1, [f"imagefolder:{tmp_path}"]
    with pytest.raises(ValueError, match=r"data.mean must hold 1 number, one per channel of imagefolder"):
        validate(config)


def test_the_keys_are_typed_as_shown_and_belong_to_the_run(tmp_path: Path) -> None:
    words = ["data=imagefolder", f"data.root={tmp_path}", "encoder.name=resnet18", "data.channels=1", "data.mean=[0.45]", "data.std=[0.25]"]
    config = compose_job(words).train
    assert (config.data.channels, config.data.mean, config.data.std) == (1, [0.45], [0.25])
    names = [signature(c) for c in (config, compose_job([*words, "data.mean=[0.5]"]).train, compose_job(words[:3]).train)]
    assert len(set(names)) == 3
