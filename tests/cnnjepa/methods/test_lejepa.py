"""LeJEPA: its loss written down once more from the paper, with loops and complex numbers; its directions, views and rules."""

import cmath
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cnnjepa.config import EncoderConfig, EncoderName, method_module
from cnnjepa.data.views import ViewSpec, draw_crop
from cnnjepa.methods.lejepa import Config, draw_directions, prediction_loss, sigreg_loss
from cnnjepa.randomness import Stream, generator
from cnnjepa.rules import validate
from tests.cnnjepa.methods.test_methods import assert_refused, batch_for, build, small


def epps_pulley(samples: list[float], knots: int) -> float:
    """The paper's statistic: N times the integral of the weighted squared distance of characteristic functions over [-5, 5]."""
    n, step = len(samples), 10 / (knots - 1)
    heights = []
    for k in range(knots):
        t = -5 + k * step
        empirical = sum(cmath.exp(1j * t * x) for x in samples) / n
        heights.append(abs(empirical - math.exp(-t * t / 2)) ** 2 * math.exp(-t * t / 2))
    return n * sum((a + b) / 2 * step for a, b in itertools.pairwise(heights))


def sigreg(z: Tensor, directions: Tensor, knots: int) -> float:
    found = []
    for view in z:
        for m in range(directions.shape[1]):
            samples = [sum(float(a) * float(b) for a, b in zip(row, directions[:, m], strict=True)) for row in view]
            found.append(epps_pulley(samples, knots))
    return sum(found) / len(found)


@pytest.mark.parametrize("knots", [3, 17, 41])
def test_sigreg_is_the_papers_statistic(knots: int) -> None:
    z = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1.7 + 0.3
    directions = draw_directions(0, 3, 4, 5)
    assert float(sigreg_loss(z, directions, knots)) == pytest.approx(sigreg(z, directions, knots), rel=1e-10)


def test_the_prediction_is_the_mean_squared_distance_to_the_mean_of_the_global_views() -> None:
    z = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = 0.0
    for v in range(4):
        for b in range(3):
            for d in range(5):
                total += float(((z[0, b, d] + z[1, b, d]) / 2 - z[v, b, d]) ** 2)
    assert float(prediction_loss(z, 2)) == pytest.approx(total / 60, rel=1e-12)


def test_the_loss_of_a_batch_is_both_weighed_with_one_minus_lambda_and_lambda() -> None:
    """From the views on: each view encoded on its own with the statistics of all, then head, statistic and mean."""
    config = small("lejepa", seed=4)
    method = build(config, torch.float64)
    batch = batch_for(config, method, step=2, dtype=torch.float64)
    out = method(batch)
    with torch.no_grad():
        large, little = torch.cat(batch.views[:2]), torch.cat(batch.views[2:])
        pooled = torch.cat([method.encoder(v).mean((2, 3)) for v in (large, little)])  # type: ignore[operator]
        z = method.head(pooled).view(4, 8, 12)  # type: ignore[operator]
    directions = draw_directions(4, 2, 12, 32)
    centre = (z[0] + z[1]) / 2
    prediction = float(sum((centre - view).square().sum() for view in z)) / z.numel()
    expected = 0.95 * prediction + 0.05 * sigreg(z, directions, 17)
    assert out["loss"].item() == pytest.approx(expected, rel=1e-9)
    assert (out["prediction"].item(), out["sigreg"].item()) == pytest.approx((prediction, sigreg(z, directions, 17)), rel=1e-9)


def test_nothing_is_held_from_the_gradient() -> None:
    """No teacher and no stop-gradient: the centre is pulled too."""
    z = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: prediction_loss(z, 2), z)
    assert torch.autograd.gradcheck(lambda z: sigreg_loss(z, draw_directions(0, 0, 2, 3), 17), z)


def test_embeddings_of_a_normal_are_preferred_to_collapsed_wide_and_narrow_ones() -> None:
    z = torch.randn(1, 2000, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    directions = draw_directions(0, 0, 8, 64)
    fit = float(sigreg_loss(z, directions, 17))
    assert fit < 2  # of a true normal the statistic does not grow with the number of images
    for other in (0 * z, 2 * z, z / 2, z + 1, z[:, :, :1].expand_as(z)):
        assert float(sigreg_loss(other, directions, 17)) > 20 * fit


def test_directions_are_unit_vectors_of_seed_and_step() -> None:
    first = draw_directions(3, 7, 16, 40)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(40, dtype=torch.float64))
    assert torch.equal(first, draw_directions(3, 7, 16, 40))
    assert not torch.equal(first, draw_directions(3, 8, 16, 40))
    assert not torch.equal(first, draw_directions(4, 7, 16, 40))


def test_views_are_two_large_and_six_small_crops_with_the_same_changes() -> None:
    config = small("lejepa")
    config.method = Config()
    config.encoder, config.data.image_size = EncoderConfig(EncoderName.resnet50), 224
    views = method_module("lejepa").Method.views(config)
    assert [(v.size, v.min_scale, v.max_scale) for v in views] == [(224, 0.3, 1.0)] * 2 + [(98, 0.05, 0.3)] * 6
    assert len({str(v.augment) for v in views}) == 1
    augment = Config().augment
    assert (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (augment.jitter_probability, augment.grey_probability, augment.blur_probability) == (0.8, 0.2, 0.5)
    assert augment.solarise_probability == 0.2
    config.encoder = EncoderConfig(EncoderName.vit_small)
    assert {v.size for v in method_module("lejepa").Method.views(config)} == {224}


def test_a_local_crop_takes_no_more_than_its_share() -> None:
    spec = ViewSpec(8, 0.05, 0.0, max_scale=0.3)
    shares = []
    for i in range(500):
        _, _, height, width = draw_crop(spec, 200, 300, generator(0, Stream.view, i))
        shares.append(height * width / 60_000)
    assert 0.045 < min(shares) < 0.06
    assert 0.28 < max(shares) < 0.31
    assert np.mean(shares) == pytest.approx(0.175, abs=0.01)


RULES = [
    ({"global_views": 0}, "method.global_views must be at least 1; got 0"),
    ({"local_views": -1}, "method.local_views must be at least 0 and give 2 views with the global ones; got -1"),
    ({"global_views": 1, "local_views": 0}, "method.local_views must be at least 0 and give 2 views with the global ones; got 0"),
    ({"local_scale_min": 0.4}, "method.local_scale_min and local_scale_max must satisfy 0 < min <= max <= 1; got 0.4 and 0.3"),
    ({"local_size": 7}, "method.local_size must be 0 or at least 8 pixels; got 7"),
    ({"sigreg_weight": 1.5}, r"method.sigreg_weight must lie in \[0, 1\]; got 1.5"),
    ({"knots": 16}, "method.knots must be odd and at least 3; got 16"),
    ({"directions": 0}, "method.directions must be at least 1; got 0"),
]


@pytest.mark.parametrize(("changes", "says"), RULES)
def test_what_cannot_be_is_refused(changes: dict[str, float], says: str) -> None:
    assert_refused("lejepa", changes, says)


def test_a_vit_sees_local_crops_of_its_own_size_alone() -> None:
    config = small("lejepa")
    config.encoder = EncoderConfig(EncoderName.vit_tiny, patch_size=8, vit_depth=1)
    with pytest.raises(ValueError, match=r"method.local_size must be 0 or data.image_size with a ViT, whose grid is fixed; got 16"):
        validate(config)
    config.method.local_size = 0  # type: ignore[attr-defined]
    validate(config)
    method = build(config)
    assert method(batch_for(config, method))["loss"].isfinite()
