import copy

import numpy as np
import pytest
import timm
import torch
import torch._inductor.config
import torchvision
from torch import Tensor, nn

from cnnjepa.batch import Batch
from cnnjepa.config import EncoderConfig, EncoderName, PredictorConfig, PredictorConv, TrainConfig
from cnnjepa.data_config import DataConfig
from cnnjepa.methods.cnn_jepa import Config, Method
from cnnjepa.models.ema import ema_update, target_of
from cnnjepa.models.masked import MaskedBatchNorm2d, Visibility
from cnnjepa.models.predictor import build_predictor
from cnnjepa.models.resnet import build_encoder

TORCHVISION = [
    EncoderName.resnet18,
    EncoderName.resnet34,
    EncoderName.resnet50,
    EncoderName.resnet101,
    EncoderName.resnet152,
    EncoderName.wide_resnet50_2,
]


def lively(encoder: nn.Module) -> nn.Module:
    """Zero-initialised norms would hide the residual branches from a test."""
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return encoder.double().train()


@pytest.mark.parametrize("name", TORCHVISION, ids=lambda n: n.name)
def test_keys_and_shapes_are_torchvisions_less_the_classifier(name: EncoderName) -> None:
    with torch.device("meta"):
        theirs = {k: v.shape for k, v in getattr(torchvision.models, name.name)().state_dict().items() if not k.startswith("fc.")}
        ours = {k: v.shape for k, v in build_encoder(EncoderConfig(name)).state_dict().items()}
    assert ours == theirs


def test_resnet200_is_timms_less_the_classifier() -> None:
    with torch.device("meta"):
        theirs = {k: v.shape for k, v in timm.create_model("resnet200", num_classes=0).state_dict().items()}
        ours = {k: v.shape for k, v in build_encoder(EncoderConfig(EncoderName.resnet200)).state_dict().items()}
    assert ours == theirs


@pytest.mark.parametrize("name", [EncoderName.resnet18, EncoderName.resnet50, EncoderName.wide_resnet50_2], ids=lambda n: n.name)
def test_dense_features_are_torchvisions(name: EncoderName) -> None:
    ours, theirs = lively(build_encoder(EncoderConfig(name))), getattr(torchvision.models, name.name)().double().train()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    pooled = ours(images).mean((2, 3))
    theirs.fc = nn.Identity()
    torch.testing.assert_close(pooled, theirs(images), rtol=1e-9, atol=1e-12)


def test_the_last_norm_of_each_block_starts_at_zero() -> None:
    encoder = build_encoder(EncoderConfig(EncoderName.resnet50))
    assert all((m.weight == 0).all() for k, m in encoder.named_modules() if k.endswith("bn3"))


def test_resnet_small_has_a_grid_of_4x4_at_32_pixels() -> None:
    assert build_encoder(EncoderConfig(width=8, blocks=2))(torch.randn(2, 3, 32, 32)).shape == (2, 32, 4, 4)


@pytest.mark.parametrize("name", [EncoderName.resnet18, EncoderName.resnet50, EncoderName.resnet_small], ids=lambda n: n.name)
def test_an_all_visible_mask_equals_the_dense_network(name: EncoderName) -> None:
    size = 24 if name is EncoderName.resnet_small else 96
    dense = lively(build_encoder(EncoderConfig(name, width=8)))
    masked = copy.deepcopy(dense)
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(masked(images, Visibility(torch.ones(3, 3, 3).bool())), dense(images), rtol=1e-9, atol=1e-12)
    for key, buffer in dense.state_dict().items():
        torch.testing.assert_close(masked.state_dict()[key], buffer, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", [EncoderName.resnet18, EncoderName.resnet_small], ids=lambda n: n.name)
def test_hidden_pixels_change_nothing(name: EncoderName) -> None:
    cell = 8 if name is EncoderName.resnet_small else 32
    encoder = lively(build_encoder(EncoderConfig(name, width=8)))
    visible = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    visible[:, 0, 0] = True
    images = torch.randn(4, 3, 3 * cell, 3 * cell, dtype=torch.float64)
    hidden_pixels = ~visible.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, None]
    copied = copy.deepcopy(encoder)
    features = encoder(images, Visibility(visible))
    others = copied(torch.where(hidden_pixels, torch.randn_like(images) * 100, images), Visibility(visible))
    assert torch.equal(features, others)
    assert not features[(~visible)[:, None].expand_as(features)].any()
    assert all(torch.equal(a, b) for a, b in zip(encoder.buffers(), copied.buffers(), strict=True))


def test_masked_batchnorm_is_batchnorm_of_the_visible_rows() -> None:
    x = torch.randn(5, 6, 8, 8, dtype=torch.float64)
    visible = torch.rand(5, 4, 4) < 0.4
    mask = visible.repeat_interleave(2, 1).repeat_interleave(2, 2)
    ours, plain = MaskedBatchNorm2d(6).double(), nn.BatchNorm1d(6).double()
    y = ours(x * mask[:, None], Visibility(visible))
    torch.testing.assert_close(y.permute(0, 2, 3, 1)[mask], plain(x.permute(0, 2, 3, 1)[mask]))
    torch.testing.assert_close(ours.running_var, plain.running_var)  # unbiased over the visible count
    evaluated = ours.eval()(x * mask[:, None], Visibility(visible))
    torch.testing.assert_close(evaluated.permute(0, 2, 3, 1)[mask], plain.eval()(x.permute(0, 2, 3, 1)[mask]))
    assert not evaluated.permute(0, 2, 3, 1)[~mask].any()


def test_two_passes_may_be_open_at_once_under_different_masks() -> None:
    encoder = lively(build_encoder(EncoderConfig(width=8)))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    masks = [Visibility(torch.rand(2, 4, 4) < 0.5) for _ in range(2)]
    alone = [copy.deepcopy(encoder)(images, m) for m in masks]
    both = [copy.deepcopy(encoder)(images, m) for m in masks]
    (both[0].sum() + both[1].sum()).backward()
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


def test_a_mask_that_does_not_tile_the_map_is_refused() -> None:
    for cells in ((2, 3, 3), (2, 8, 8), (1, 4, 4)):
        with pytest.raises(ValueError, match="for each 8x8 pixels of 2 images of 32x32; got {}x{}x{} cells".format(*cells)):
            build_encoder(EncoderConfig(width=8))(torch.randn(2, 3, 32, 32), Visibility(torch.ones(cells).bool()))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_predictor_sizes_are_the_papers() -> None:
    assert count(build_predictor(PredictorConfig(), 2048)) == pytest.approx(12.66e6, rel=1e-3)
    assert count(build_predictor(PredictorConfig(PredictorConv.dense), 2048)) == pytest.approx(113e6, rel=5e-3)


@pytest.mark.parametrize("conv", list(PredictorConv), ids=lambda c: c.name)
@pytest.mark.parametrize(("depth", "kernel", "width"), [(1, 3, 1.0), (6, 9, 1.0), (2, 5, 0.5), (3, 7, 2.0)])
def test_predictors_keep_the_shape_and_end_in_relu(conv: PredictorConv, depth: int, kernel: int, width: float) -> None:
    predictor = build_predictor(PredictorConfig(conv, depth, kernel, width), 16)
    out: Tensor = predictor(torch.randn(4, 16, 4, 4))
    assert out.shape == (4, 16, 4, 4)
    assert (out >= 0).all()
    assert sum(isinstance(m, nn.ReLU) for m in predictor) == depth
    kernels = {m.kernel_size[0] for m in predictor if isinstance(m, nn.Conv2d)}
    assert kernels == {"depthwise": {kernel, 1}, "dense": {kernel}, "pointwise": {1}}[conv.name]


def test_ema_moves_parameters_and_never_buffers() -> None:
    online = build_encoder(EncoderConfig(width=8), generator_seed=1)
    target = target_of(online)
    before = copy.deepcopy(target.state_dict())
    online(torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        for parameter in online.parameters():
            parameter += 1
    ema_update(target, online, 0.75)
    for key, parameter in target.named_parameters():
        torch.testing.assert_close(parameter, before[key] + 0.25)
        assert not parameter.requires_grad
    assert all(torch.equal(b, before[k]) for k, b in target.named_buffers())


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first = build_encoder(EncoderConfig(width=8), generator_seed=3).state_dict()
    torch.randn(5)
    again, other = (build_encoder(EncoderConfig(width=8), generator_seed=s).state_dict() for s in (3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler", [pytest.param(None, marks=pytest.mark.nightly, id="compiler"), pytest.param("/nowhere/c++", id="no_compiler")]
)
def test_compiling_changes_nothing_and_is_left_alone_where_it_cannot_be_done(
    compiler: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)

    def losses(compiled: bool) -> list[float]:
        torch.compiler.reset()
        config = TrainConfig(method=Config(), encoder=EncoderConfig(width=4, compile=compiled), data=DataConfig(image_size=24))
        method = Method(config, total_steps=2).to(memory_format=torch.channels_last).train()
        assert not [key for key in method.state_dict() if key.startswith("run_")]
        found = []
        for step in range(2):
            loss = method(Batch([images], step, np.arange(6)))["loss"]
            loss.backward()
            assert all(p.grad is not None for p in method.predictor.parameters())
            found += [loss.item(), method.target_encoder.bn1.running_mean.norm().item()]
        return found

    plain = losses(False)
    if compiler:
        monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (compiler,))
        monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    assert losses(True) == pytest.approx(plain, rel=1e-4)
    assert ("torch.compile is not used" in caplog.text) or not compiler


def test_convolutions_start_as_he_et_al_for_what_comes_out_and_norms_at_1_but_the_last_of_each_block() -> None:
    encoder = build_encoder(EncoderConfig(EncoderName.resnet18), generator_seed=0)
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert float(module.weight.std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.03), name
        if isinstance(module, MaskedBatchNorm2d):
            assert (module.weight == (0 if name.endswith("bn2") else 1)).all(), name
            assert (module.eps, module.momentum) == (1e-5, 0.1)
