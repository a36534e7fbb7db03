"""ConvNeXts with a masked forward pass (Liu et al. 2022, arXiv 2201.03545).

Keys (without `head`) and initialisation are timm's. Only the depthwise 7x7 convolutions look beyond
a cell: stem and downsampling cut the image into squares that tile the cells, and all other layers
act on each position separately. Hidden positions therefore need to be zeroed once after each of
these, not after every operation. Tiled execution computes all other layers only for visible
positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnjepa.config import EncoderConfig, EncoderName, Execution
from cnnjepa.models.masked import Visibility, hide, needed

# Blocks per stage, channels of the first.
SHAPES = {
    EncoderName.convnext_tiny: ([3, 3, 9, 3], 96),
    EncoderName.convnext_small: ([3, 3, 27, 3], 96),
    EncoderName.convnext_base: ([3, 3, 27, 3], 128),
}


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of each position; hidden positions enter no statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise 7x7 convolution and pointwise MLP, scaled per channel, with a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(channels, 4 * channels), "fc2": nn.Linear(4 * channels, channels)})

    def forward(self, x_BCHW: Tensor, visibility: Visibility | None, execution: Execution = Execution.masked) -> Tensor:
        """Map [B, C, H, W] to the same shape; zero where hidden, if the input is."""
        y_BHWC = self.conv_dw(x_BCHW).permute(0, 2, 3, 1)
        if visibility is None or execution is Execution.masked:
            return x_BCHW + hide(self._pointwise(y_BHWC).permute(0, 3, 1, 2), visibility)
        # All that follows, nearly all of the arithmetic, is computed only for visible positions.
        b, h, w, c = y_BHWC.shape
        rows = visibility.positions(h, w)
        y_NC = self._pointwise(y_BHWC.reshape(-1, c).index_select(0, rows))
        y_BHWC = y_NC.new_zeros(b * h * w, c).index_copy(0, rows, y_NC).view(b, h, w, c)
        return x_BCHW + y_BHWC.permute(0, 3, 1, 2)

    def _pointwise(self, y_xC: Tensor) -> Tensor:
        return self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm(y_xC)))) * self.gamma


class Stage(nn.Module):
    """Blocks after a downsampling to half the resolution, which the first stage lacks."""

    def __init__(self, c_in: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if c_in != channels:
            self.downsample = nn.Sequential(LayerNorm2d(c_in), nn.Conv2d(c_in, channels, 2, 2))
        self.blocks = nn.ModuleList([Block(channels) for _ in range(blocks)])

    def forward(self, x_BCHW: Tensor, visibility: Visibility | None, execution: Execution) -> Tensor:
        """Map [B, C, H, W] to [B, C', H/2, W/2], or to the same shape in the first stage."""
        x = hide(self.downsample(x_BCHW), visibility)
        for block in self.blocks:
            x = block(x, visibility, execution)
        return x


class ConvNeXt(nn.Module):
    """Network from images [B, channels, H, W] to features [B, out_channels, H/cell, W/cell].

    Features have either sign. A cell has 32 pixels per side with four stages.
    """

    def __init__(self, stages: list[int], width: int, channels: int = 3) -> None:
        super().__init__()
        self.execution, self.cell = Execution.tiled, 4 * 2 ** (len(stages) - 1)
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 4, 4), LayerNorm2d(width))
        sizes = [width] + [width * 2**i for i in range(len(stages))]
        self.stages = nn.ModuleList([Stage(sizes[i], sizes[i + 1], blocks) for i, blocks in enumerate(stages)])
        self.stage_channels, self.out_channels = sizes[1:], sizes[-1]
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, image_BCHW: Tensor, visibility: Visibility | None = None) -> Tensor:
        """Return the features, zero where hidden; raise ValueError if the mask does not fit."""
        return self.stage_features(image_BCHW, visibility)[-1]

    def stage_features(self, image_BCHW: Tensor, visibility: Visibility | None = None) -> list[Tensor]:
        """Return the features after each stage, the last of them those of `forward`.

        The stage before another has twice its height and width, and `stage_channels` has the channels.
        """
        visibility = needed(visibility, image_BCHW, self.cell)
        x, found = hide(self.stem(hide(image_BCHW, visibility)), visibility), []
        for stage in self.stages:
            x = stage(x, visibility, self.execution)
            found.append(x)
        return found


def build_convnext(config: EncoderConfig, channels: int = 3) -> ConvNeXt:
    """Return a freshly initialised ConvNeXt of the named size."""
    net = ConvNeXt(*SHAPES[config.name], channels)
    net.execution = config.execution
    return net
