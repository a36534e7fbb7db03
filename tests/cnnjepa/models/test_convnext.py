"""ConvNeXts are timm's where all is visible, and let nothing through where it is not."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from cnnjepa.batch import Batch
from cnnjepa.config import EncoderConfig, EncoderName, Execution
from cnnjepa.methods.cnn_jepa import Method
from cnnjepa.models.convnext import SHAPES, Block, ConvNeXt
from cnnjepa.models.encoders import build_encoder
from cnnjepa.models.masked import Visibility
from tests.support.tiny import tiny_config


def small() -> ConvNeXt:
    """Two stages of 8 and 16 channels, 8 pixels a cell; scales of 1e-6 would hide the branches from a test."""
    torch.manual_seed(0)
    net = ConvNeXt([1, 2], 8).double()
    for module in net.modules():
        if isinstance(module, Block):
            nn.init.uniform_(module.gamma, 0.5, 1.5)
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.bias, 0.5, 1.5)
    return net


def test_features_are_timms_under_timms_keys() -> None:
    ours = small()
    theirs = timm.models.ConvNeXt(depths=(1, 2, 1, 1), dims=(8, 16, 32, 64), num_classes=0).double()
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert unexpected == []
    assert all(k.startswith(("stages.2", "stages.3", "head")) for k in missing)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs.stages[1](theirs.stages[0](theirs.stem(images))), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SHAPES, ids=lambda n: n.name)
def test_keys_and_shapes_are_timms_less_the_head(name: EncoderName) -> None:
    with torch.device("meta"):
        theirs = {k: v.shape for k, v in timm.create_model(name.name).state_dict().items() if not k.startswith("head.")}
        ours = {k: v.shape for k, v in build_encoder(EncoderConfig(name), 224, 0).state_dict().items()}
    assert ours == theirs


def visible_and_pixels() -> tuple[Tensor, Tensor]:
    visible = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    return visible, visible.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]


def test_an_all_visible_mask_equals_the_dense_network() -> None:
    net, images = small(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(net(images, Visibility(torch.ones(3, 4, 4).bool())), net(images), rtol=1e-12, atol=1e-12)


def test_hidden_pixels_change_nothing_and_hidden_features_are_zero() -> None:
    net, images = small(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    visible, shown = visible_and_pixels()
    features = net(images, Visibility(visible))
    assert torch.equal(features, net(torch.where(shown, images, torch.randn_like(images) * 100), Visibility(visible)))
    assert not features[(~visible)[:, None].expand_as(features)].any()
    assert features[visible[:, None].expand_as(features)].any()


def test_masking_once_a_convolution_equals_masking_after_every_operation() -> None:
    net, images = small(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    visible, _ = visible_and_pixels()
    visibility = Visibility(visible)
    copied = copy.deepcopy(net)
    copied.execution = Execution.masked

    def zero(_module: nn.Module, _given: object, out: Tensor) -> Tensor:
        if out.ndim == 4 and isinstance(_module, nn.Conv2d):
            return out * visibility.at(out)
        return out * visibility.at(out.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if out.shape[1] == out.shape[2] else out

    for module in copied.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) or type(module) is nn.LayerNorm:
            module.register_forward_hook(zero)
    torch.testing.assert_close(copied(images, visibility), net(images, visibility), rtol=1e-12, atol=1e-12)


def test_cnn_jepa_trains_a_convnext() -> None:
    config = tiny_config(encoder=EncoderConfig(EncoderName.convnext_tiny))
    config.data.image_size = 96
    method = Method(config, 10).train()
    out = method(Batch([torch.randn(2, 3, 96, 96)], 0, torch.arange(2).numpy()))
    out["loss"].backward()
    assert out["loss"].isfinite()
    assert all(p.grad is not None for p in method.encoder.parameters())
    assert all(p.grad is None for p in method.target_encoder.parameters())


def test_weights_start_as_published() -> None:
    """Liu et al. 2022, appendix A.1: truncated normals of .02, biases 0, and layer scales of 1e-6."""
    torch.manual_seed(0)
    net = ConvNeXt([1, 1], 32)
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            assert float(module.weight.std()) == pytest.approx(0.02, rel=0.12)
            assert module.bias is not None
            assert not module.bias.any()
        if isinstance(module, Block):
            assert (module.gamma == 1e-6).all()
