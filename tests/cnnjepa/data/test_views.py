"""Views are functions of (seed, epoch, sample, view), are changed as strongly and as often as published, and by nothing else."""

import itertools
import random as global_random
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from cnnjepa.config import AugmentConfig, TrainConfig, method_module
from cnnjepa.data.datasets import Dataset, GreyImages, Splits
from cnnjepa.data.loader import Plan, train_loader
from cnnjepa.data.pictures import Drawn
from cnnjepa.data.views import ViewSpec, _augment, _reduction, random_views
from cnnjepa.randomness import Stream, generator
from cnnjepa.run.ranks import Ranks
from tests.cnnjepa.methods.test_methods import METHODS, small

VIEWED = [m for m in METHODS if method_module(m).Method.views(small(m))]
JOINT = [(m, v) for m, views in (("simclr", 2), ("byol", 2), ("vicreg", 2)) for v in range(views)]
IMAGES, DRAWS = 8, 200
NEVER = {f.name: 0.0 for f in fields(AugmentConfig) if f.name.endswith("_probability")}


def spec_of(method: str, view: int) -> ViewSpec:
    spec: ViewSpec = method_module(method).Method.views(small(method))[view]
    return spec


def epochs_of_one_picture(config: TrainConfig, plan_seed: int = 1) -> dict[tuple[int, int, int], Tensor]:
    """The loader's views by (epoch, image, view), of two epochs over images that are all the same; the order is the plan's."""
    noise = np.random.default_rng(0).integers(0, 256, (1, 40, 40), dtype=np.uint8)
    images, indices = GreyImages(noise.repeat(IMAGES, axis=0), np.zeros(IMAGES, np.int64)), np.arange(IMAGES)
    splits = Splits(Dataset(images, images, 1, (0.5,) * 3, (0.5,) * 3), indices, indices, indices, indices)
    plan = Plan(IMAGES, IMAGES, IMAGES, 1, 2, plan_seed)
    loader = train_loader(config, splits, method_module(config.method.name).Method.views(config), plan, Ranks(0, 1, torch.device("cpu")), 0)
    found = {}
    for epoch, (views, _) in enumerate(loader):
        for (v, view), (row, image) in itertools.product(enumerate(views), enumerate(plan.order(epoch).tolist())):
            found[epoch, image, v] = view[row]
    return found


@pytest.mark.parametrize("name", VIEWED)
def test_views_follow_seed_epoch_image_and_view_alone(name: str) -> None:
    """Not the order of images, and no global generator."""
    first = epochs_of_one_picture(small(name))
    for disturb in (torch.manual_seed, np.random.seed, global_random.seed):
        disturb(3)
    again = epochs_of_one_picture(small(name), plan_seed=2)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)
    other = epochs_of_one_picture(small(name, seed=9))
    assert not any(torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("name", VIEWED)
def test_each_epoch_image_and_view_is_drawn_from_a_stream_of_its_own(name: str) -> None:
    found = epochs_of_one_picture(small(name))
    assert len(found) == 2 * IMAGES * len(method_module(name).Method.views(small(name)))
    alike = [(a, b) for a, b in itertools.combinations(found, 2) if torch.equal(found[a], found[b])]
    assert alike == []


def test_the_views_of_the_joint_embedding_methods_are_as_published() -> None:
    """reference: jitter strengths, and the probabilities of blur and solarisation by view."""
    found = {}
    for name, view in JOINT:
        a = spec_of(name, view).augment
        assert a is not None
        assert (a.min_crop_scale, a.jitter_probability, a.grey_probability) == (0.08, 0.8, 0.2)
        found[name, view] = (a.brightness, a.contrast, a.saturation, a.hue, a.blur_probability, a.solarise_probability)
    assert found["simclr", 0] == found["simclr", 1] == (0.8, 0.8, 0.8, 0.2, 0.5, 0.0)
    assert found["vicreg", 0] == found["vicreg", 1] == (0.4, 0.4, 0.2, 0.1, 0.5, 0.1)
    assert found["byol", 0] == (0.4, 0.4, 0.2, 0.1, 1.0, 0.0)
    assert found["byol", 1] == (0.4, 0.4, 0.2, 0.1, 0.1, 0.2)


# Of 8 colours as far apart as can be: the weakest blur changes it, and its inversion is black.
NOISE = np.random.default_rng(0).integers(0, 2, (224, 224, 3), dtype=np.uint8) * np.uint8(255)


def is_grey(view: Tensor) -> bool:
    return bool((view == view[:1]).all())


def is_blurred(view: Tensor) -> bool:
    """What was black is no longer of one colour."""
    return view.permute(1, 2, 0)[torch.from_numpy(NOISE == 0).all(dim=2)].unique(dim=0).shape[0] > 1


KINDS: dict[str, Callable[[Tensor], bool]] = {
    "jitter_probability": lambda view: not is_grey(view) and not is_blurred(view),
    "grey_probability": lambda view: is_grey(view) and bool(view.any()) and not is_blurred(view),
    "blur_probability": is_blurred,
    "solarise_probability": lambda view: not view.any(),
}


def drawn(spec: ViewSpec) -> list[Tensor]:
    """Views of the noise whose crop is always the whole of it."""
    whole = replace(spec, size=224, min_scale=1.0, min_aspect=1.0, max_aspect=1.0)
    return [random_views([whole], Drawn(NOISE), [generator(1, Stream.view, 0, i, 0)])[0] for i in range(DRAWS)]


def is_noise(view: Tensor) -> bool:
    return np.array_equal(view.permute(1, 2, 0), NOISE)


def assert_share(events: list[bool], wanted: float) -> None:
    deviation = (wanted * (1 - wanted) / len(events)) ** 0.5
    assert sum(events) / len(events) == pytest.approx(wanted, abs=3.5 * deviation)


@pytest.mark.slow
@pytest.mark.parametrize("change", KINDS)
@pytest.mark.parametrize(("name", "view"), JOINT)
def test_each_change_comes_as_often_as_its_own_probability_says(name: str, view: int, change: str) -> None:
    spec = spec_of(name, view)
    assert spec.augment is not None
    wanted = getattr(spec.augment, change)
    views = drawn(replace(spec, flip_probability=0.0, augment=replace(spec.augment, **{**NEVER, change: wanted})))
    assert_share([not is_noise(v) for v in views], wanted)
    assert all(is_noise(v) or KINDS[change](v) for v in views)


def test_a_view_is_mirrored_as_often_as_the_data_says() -> None:
    views = drawn(replace(spec_of("cnn_jepa", 0), flip_probability=0.3))
    assert_share([is_noise(v.flip(2)) for v in views], 0.3)
    assert_share([is_noise(v) for v in views], 0.7)


@pytest.mark.parametrize(("name", "view"), JOINT)
def test_jitter_draws_each_strength_from_its_range_in_any_order(name: str, view: int, monkeypatch: pytest.MonkeyPatch) -> None:
    factors: dict[str, list[float]] = {"brightness": [], "contrast": [], "saturation": [], "hue": []}
    order: list[str] = []

    def recorded(kind: str) -> object:
        honest = getattr(TF, f"adjust_{kind}")

        def adjust(image: object, factor: float) -> object:
            factors[kind].append(factor)
            order.append(kind)
            return honest(image, factor)

        return adjust

    for kind in factors:
        monkeypatch.setattr(TF, f"adjust_{kind}", recorded(kind))
    spec = spec_of(name, view)
    assert spec.augment is not None
    drawn(replace(spec, augment=replace(spec.augment, **{**NEVER, "jitter_probability": 1.0})))
    for kind, found in factors.items():
        strength = getattr(spec.augment, kind)
        low, high = (-strength, strength) if kind == "hue" else (1 - strength, 1 + strength)
        assert len(found) == DRAWS
        assert low <= min(found) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(found) <= high
    assert len({tuple(order[i : i + 4]) for i in range(0, len(order), 4)}) == 24


@pytest.mark.parametrize("size", [224, 56])
def test_blur_is_drawn_for_224_pixels_and_shrinks_with_the_view(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[float] = []
    filtered = ImageFilter.GaussianBlur
    monkeypatch.setattr(ImageFilter, "GaussianBlur", lambda radius: (reported.append(radius), filtered(radius))[1])
    augment = replace(AugmentConfig(), **{**NEVER, "blur_probability": 1.0})
    random = np.random.default_rng(5)
    _augment(augment, Image.fromarray(NOISE[:size, :size]), random)
    same = np.random.default_rng(5)
    same.random(4)
    assert reported == pytest.approx([same.uniform(0.1, 2.0) * size / 224], rel=1e-12)


@pytest.mark.parametrize(
    ("crops", "factor"),
    [
        ([(256, 256)], 8),
        ([(255, 256)], 4),
        ([(256, 255)], 4),
        ([(400, 95)], 2),
        ([(95, 400)], 2),
        ([(63, 400)], 1),
        ([(10, 10)], 1),
        ([(256, 256), (64, 256)], 2),
        ([(64, 256), (256, 256)], 2),
    ],
)
def test_scaled_decoding_leaves_each_crop_at_least_the_size_of_its_view(crops: list[tuple[int, int]], factor: int) -> None:
    assert _reduction([ViewSpec(32, 0.2, 0.5)] * len(crops), [(0, 0, h, w) for h, w in crops]) == factor
