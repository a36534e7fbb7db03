"""`visible` refuses by name what it does not know, images and masks that do not fit, and says so in the guide."""

import re

import pytest
import timm
import torch
from torch import Tensor, nn

from cnnjepa.models import visible
from tests.cnnjepa.models.test_visible import TIMM, TORCHVISION, build, drawn, one_cell
from tests.support.documented import messages, page

REFUSED = {
    "skresnet18": "layer1.0.conv1 (timm.layers.selective_kernel.SelectiveKernel): calls stack, which is not known on a map",
    "resnetblur50": "maxpool.1 (timm.layers.blur_pool.BlurPool2d): calls pad",
    "resnest14d": "layer1.0.conv2 (timm.layers.split_attn.SplitAttn): calls reshape",
    "tf_efficientnet_b0": "conv_stem (timm.layers.conv2d_same.Conv2dSame): torch.fx cannot trace its forward pass",
    "resnetv2_50x1_bit": "stem.pad (torch.nn.modules.padding.ConstantPad2d): is not known",
    "hrnet_w18_small": "stage2.0.fuse_layers.0.1.2 (torch.nn.modules.upsampling.Upsample): is not known",
    "inception_v3": "Conv2d_1a_3x3.conv (torch.nn.modules.conv.Conv2d): with kernel 3, stride 2, padding 0",
    "inception_next_atto": "stages.0.blocks.0.token_mixer.dwconv_h (torch.nn.modules.conv.Conv2d): a kernel of (9, 1)",
    "gcresnet33ts": "stages.0.0.attn (timm.layers.global_context.GlobalContext): calls reshape",
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unknown_layer_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"^visible: {re.escape(REFUSED[name])}") as refusal:
        visible(timm.create_model(name))
    assert "\n" not in str(refusal.value)


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(3)


class Places(nn.Module):
    """Adds a tensor with a value for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.randn(1, 8, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.at


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def after_a_stem(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), layer)


REFUSED_LAYERS = {
    "flip": (Shuffle(), r"1 \(.*\.Shuffle\): calls flip, which is not known on a map"),
    "instance": (nn.InstanceNorm2d(8), r"1 \(torch.nn.modules.instancenorm.InstanceNorm2d\): is not known"),
    "sync": (nn.SyncBatchNorm(8), r"1 \(torch.nn.modules.batchnorm.SyncBatchNorm\): is not known"),
    "circular": (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), r"1 \(.*Conv2d\): pads with circular"),
    "valid": (nn.Conv2d(8, 8, 3), r"1 \(.*Conv2d\): with kernel 3, stride 1, padding 0, dilation 1 its output is not"),
    "transposed": (nn.ConvTranspose2d(8, 8, 2, 2), r"1 \(.*ConvTranspose2d\): is not known"),
    "channels": (nn.LayerNorm(6), r"1 \(.*LayerNorm\): needs its channels in dimension 3"),
    "dropout": (nn.Dropout2d(), r"1 \(.*Dropout2d\): is not known"),
    "tuple": (Two(), r"the network itself \(.*Sequential\): returns something other than one tensor"),
}


@pytest.mark.parametrize("layer", REFUSED_LAYERS)
def test_a_layer_that_mixes_positions_is_refused(layer: str) -> None:
    module, message = REFUSED_LAYERS[layer]
    with pytest.raises(ValueError, match=f"^visible: {message}"):
        visible(after_a_stem(module))


def test_a_tensor_of_positions_is_refused_when_it_meets_a_map() -> None:
    with pytest.raises(ValueError, match=r"^visible: 1 \(.*Places\): combines a map with a tensor of shape \[1, 8, 4, 6\]"):
        visible(after_a_stem(Places()))(torch.randn(1, 3, 16, 24))


def test_hooks_which_would_not_run_are_refused() -> None:
    model = after_a_stem(nn.ReLU())
    model[1].register_forward_hook(lambda *_: None)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"^visible: 1 \(.*ReLU\): has forward hooks"):
        visible(model)


def test_a_single_position_for_batch_norm_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^visible: layer4.0.bn1 \(.*BatchNorm2d\): needs more than 1 visible position in training; got 1"
    ):
        visible(build("resnet18"))(drawn(1, 3, 64, 96, seed=0), one_cell())


@pytest.mark.parametrize(
    ("shape", "mask", "message"),
    [
        ((1, 3, 60, 96), None, "an image must be a multiple of 32 pixels in both directions; got 60x96"),
        ((1, 3, 64, 96), torch.ones(1, 4, 6).bool(), r"a mask must be bool \[1, 2, 3\], one value for 32x32 pixels; got bool \[1, 4, 6\]"),
        ((1, 3, 64, 96), torch.ones(1, 2, 3), r"a mask must be bool \[1, 2, 3\], .*; got float32 \[1, 2, 3\]"),
        ((2, 3, 64, 96), torch.ones(1, 2, 3).bool(), r"a mask must be bool \[2, 2, 3\], .*; got bool \[1, 2, 3\]"),
        ((1, 3, 64, 96), torch.zeros(1, 2, 3).bool(), "a mask must leave at least one cell visible; got none"),
        ((3, 64, 96), None, r"images must be floating-point \[B, C, H, W\]; got torch.float32 \[3, 64, 96\]"),
    ],
)
def test_images_and_masks_that_do_not_fit_are_refused(shape: tuple[int, ...], mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^visible: {message}$"):
        visible(timm.create_model("resnet18"))(torch.randn(shape), mask)


def test_the_guide_lists_the_networks_that_are_tested() -> None:
    text = page("visible.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| ((?:\w+, )*\w+) \|$", text.split("| family |")[1], re.M)
    assert [name for row in rows for name in row.split(", ")] == TIMM
    assert f"compares {len(TIMM)}\nnetworks of timm and {len(TORCHVISION)} of torchvision" in text
    (message,) = (m for m in messages("visible.md") if m.startswith("visible: "))
    assert message.startswith(f"visible: {REFUSED['resnest14d']}")
