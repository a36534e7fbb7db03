"""SparK: its step written down once more from the paper, the sizes of its decoder, what it may see, and that tiles change nothing."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnjepa.config import EncoderConfig, EncoderName, Execution, method_module
from cnnjepa.data.views import ViewSpec
from cnnjepa.methods.spark import Config, reconstruction_loss
from cnnjepa.models.decoder import Decoder, Densify
from cnnjepa.models.masked import Visibility
from cnnjepa.models.resnet import build_encoder
from cnnjepa.rules import validate
from tests.cnnjepa.methods.test_methods import assert_refused, batch_for, build, lively, small


def transcribed_loss(reconstruction: Tensor, image: Tensor, visible: Tensor) -> float:
    """Section 3.4, cell by cell and pixel by pixel."""
    cell = image.shape[-1] // visible.shape[-1]
    errors = []
    for b, y, x in (~visible).nonzero().tolist():
        where = (b, slice(None), slice(y * cell, (y + 1) * cell), slice(x * cell, (x + 1) * cell))
        pixels = [float(v) for v in image[where].flatten()]
        guesses = [float(v) for v in reconstruction[where].flatten()]
        mean = sum(pixels) / len(pixels)
        variance = sum((v - mean) ** 2 for v in pixels) / (len(pixels) - 1)
        targets = [(v - mean) / (variance + 1e-6) ** 0.5 for v in pixels]
        errors.append(sum((g - t) ** 2 for g, t in zip(guesses, targets, strict=True)) / len(targets))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_the_mean_squared_error_of_normalised_hidden_cells(channels: int) -> None:
    g = torch.Generator().manual_seed(0)
    image, guess = torch.randn(2, 3, channels, 12, 12, dtype=torch.float64, generator=g).unbind()
    image[0] *= 1e-4  # here the epsilon counts
    visible = torch.rand(3, 3, 3, generator=g) < 0.5
    expected = transcribed_loss(guess, image, visible)
    assert float(reconstruction_loss(guess, image, Visibility(visible))) == pytest.approx(expected, rel=1e-12)


def transcribed_reconstruction(state: dict[str, Tensor], stages: list[Tensor], visible: Tensor) -> Tensor:
    """Sections 3.2 and 3.3: densify from the last stage to the first, then up-sample and add."""

    def norm(x: Tensor, key: str, shown: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)[shown]
        mean, variance = rows.mean(0), rows.var(0, unbiased=False)
        scaled = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return scaled * state[f"{key}.weight"][:, None, None] + state[f"{key}.bias"][:, None, None]

    dense = []
    for i, x in enumerate(reversed(stages)):
        times = x.shape[-1] // visible.shape[-1]
        shown = visible.repeat_interleave(times, 1).repeat_interleave(times, 2)
        key = f"densify.{i}"
        x = torch.where(shown[:, None], norm(x, f"{key}.norm", shown), state[f"{key}.mask_token"][:, None, None])
        weight = state[f"{key}.project.weight"]
        dense.append(F.conv2d(x, weight, state[f"{key}.project.bias"], padding=weight.shape[-1] // 2))
    out = torch.zeros_like(dense[0])
    for i in range(len({k.split(".")[1] for k in state if k.startswith("blocks.")})):
        out = out + dense[i] if i < len(dense) else out
        out = F.conv_transpose2d(out, state[f"blocks.{i}.0.weight"], state[f"blocks.{i}.0.bias"], stride=2, padding=1)
        every = torch.ones(len(out), *out.shape[2:], dtype=torch.bool)
        out = norm(F.conv2d(out, state[f"blocks.{i}.1.weight"], padding=1), f"blocks.{i}.2", every).clamp(0, 6)
        out = norm(F.conv2d(out, state[f"blocks.{i}.4.weight"], padding=1), f"blocks.{i}.5", every)
    return F.conv2d(out, state["project.weight"], state["project.bias"])


def test_a_step_is_the_papers_from_the_stages_on() -> None:
    config = small("spark")
    method = lively(build(config, torch.float64))
    batch = batch_for(config, method, dtype=torch.float64)
    visibility = method.visibility(batch)  # type: ignore[operator]
    with torch.no_grad():
        encoder = copy.deepcopy(method.encoder)
        encoder.execution = Execution.masked  # type: ignore[assignment]
        stages = encoder.stage_features(batch.views[0], visibility)  # type: ignore[operator]
        guess = transcribed_reconstruction(dict(method.decoder.state_dict()), stages, visibility.visible_Bhw)  # type: ignore[union-attr]
        assert guess.shape == batch.views[0].shape
        expected = transcribed_loss(guess, batch.views[0], visibility.visible_Bhw)
    assert method(batch)["loss"].item() == pytest.approx(expected, rel=1e-9)


def test_tiles_give_the_loss_and_the_gradients_of_masked_execution() -> None:
    config = small("spark")
    tiled = lively(build(config, torch.float64))
    masked = copy.deepcopy(tiled)
    masked.encoder.execution = Execution.masked  # type: ignore[union-attr]
    batch = batch_for(config, tiled, dtype=torch.float64)
    losses = [method(batch)["loss"] for method in (tiled, masked)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-9)
    for loss in losses:
        loss.backward()
    least = 1e-3 * max(float(p.grad.abs().max()) for p in masked.parameters() if p.grad is not None)
    for (key, p), q in zip(tiled.named_parameters(), masked.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert float((p.grad - q.grad).abs().max()) <= 1e-9 * max(float(q.grad.abs().max()), least), key


def test_a_resnet_50_has_the_published_decoder() -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(EncoderName.resnet50))
        decoder = Decoder(encoder.stage_channels, encoder.cell, Config().decoder_width, 3, layer_norm=False, sync_bn=True)
    assert encoder.stage_channels == [256, 512, 1024, 2048]
    projections = [d.project for d in decoder.densify]
    assert [(p.in_channels, p.out_channels, p.kernel_size) for p in projections] == [  # type: ignore[union-attr]
        (2048, 512, (1, 1)),
        (1024, 256, (3, 3)),
        (512, 128, (3, 3)),
        (256, 64, (3, 3)),
    ]
    widths = [512, 256, 128, 64, 32, 16]
    assert [(b[0].in_channels, b[1].out_channels, b[4].out_channels) for b in decoder.blocks] == [  # type: ignore[index]
        (a, a, b) for a, b in itertools.pairwise(widths)
    ]
    # By hand: 4x4 with bias, two 3x3 without, two norms, for each block, and the last 1x1.
    blocks = sum(16 * a * a + a + 9 * a * a + 2 * a + 9 * a * b + 2 * b for a, b in itertools.pairwise(widths))
    assert sum(p.numel() for p in decoder.blocks.parameters()) + sum(p.numel() for p in decoder.project.parameters()) == blocks + 16 * 3 + 3
    assert all(m.sync for m in decoder.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_projection_that_would_change_no_width_is_left_out_of_the_last_stage_alone() -> None:
    assert isinstance(Densify(64, 64, layer_norm=False, deepest=True).project, nn.Identity)
    assert isinstance(Densify(64, 64, layer_norm=False, deepest=False).project, nn.Conv2d)
    token = Densify(4096, 8, layer_norm=False, deepest=True).mask_token.detach()
    assert 0.019 < float(token.abs().max()) <= 0.02


def test_the_reconstruction_knows_nothing_of_hidden_pixels() -> None:
    config = small("spark")
    method = lively(build(config, torch.float64))
    batch = batch_for(config, method, dtype=torch.float64)
    visibility = method.visibility(batch)  # type: ignore[operator]
    hidden = visibility.at(batch.views[0]) == 0
    other = torch.where(hidden, batch.views[0] + 3, batch.views[0])
    guesses = [method.decoder(method.encoder.stage_features(v, visibility), visibility) for v in (batch.views[0], other)]  # type: ignore[operator, union-attr]
    assert torch.equal(*guesses)


@pytest.mark.slow
def test_a_convnext_is_pretrained_with_layer_norms() -> None:
    config = small("spark")
    config.encoder, config.data.image_size, config.method.decoder_width = EncoderConfig(EncoderName.convnext_tiny), 96, 32  # type: ignore[attr-defined]
    validate(config)
    method = build(config)
    norms = [d.norm for d in method.decoder.densify]  # type: ignore[union-attr]
    assert all(isinstance(n, nn.LayerNorm) for n in norms)
    batch = batch_for(config, method, size=2)
    batch.views = [torch.randn(2, 3, 96, 96)]
    loss = method(batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in method.parameters())


def test_its_view_is_a_large_crop_that_may_be_mirrored() -> None:
    config = small("spark")
    config.data.flip_probability = 0.5
    assert method_module("spark").Method.views(config) == [ViewSpec(32, 0.67, 0.5, 3 / 4, 4 / 3)]


RULES = [
    ({"mask_ratio": 1.0}, r"method.mask_ratio must lie in \(0, 1\); got 1.0"),
    ({"decoder_width": 4}, "method.decoder_width must be a multiple of 8, since the decoder's blocks halve it; got 4"),
    ({"decoder_width": 36}, "method.decoder_width must be a multiple of 8, since the decoder's blocks halve it; got 36"),
    ({"min_crop_scale": 0.0}, r"method.min_crop_scale must lie in \(0, 1\]; got 0.0"),
]


@pytest.mark.parametrize(("changes", "says"), RULES)
def test_what_cannot_be_is_refused(changes: dict[str, float], says: str) -> None:
    assert_refused("spark", changes, says)


def test_a_vit_is_refused() -> None:
    config = small("spark")
    config.encoder = EncoderConfig(EncoderName.vit_tiny, patch_size=8)
    with pytest.raises(ValueError, match=r"encoder.name must be one of .* with method=spark; got vit_tiny"):
        validate(config)
