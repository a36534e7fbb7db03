"""The decoder of SparK (Tian et al. 2023, arXiv 2301.03580, section 3.3): from features of all stages to an image.

Shapes: B images, C channels, H x W positions of a stage, which has half the height and width of the
stage before it.
"""

import itertools

import torch
from torch import Tensor, nn

from cnnjepa.models.convnext import LayerNorm2d
from cnnjepa.models.masked import MaskedBatchNorm2d, Visibility, synchronised


class Densify(nn.Module):
    """Normalise visible features of one stage, fill hidden positions with a learned token, and project the result."""

    def __init__(self, channels: int, width: int, layer_norm: bool, deepest: bool) -> None:
        super().__init__()
        self.norm: nn.Module = LayerNorm2d(channels) if layer_norm else MaskedBatchNorm2d(channels)
        # One dimension: it is not decayed, as norms and biases are not.
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(channels), std=0.02, a=-0.02, b=0.02))
        kernel = 1 if deepest else 3
        same = deepest and channels == width
        self.project: nn.Module = nn.Identity() if same else nn.Conv2d(channels, width, kernel, padding=kernel // 2)

    def forward(self, x_BCHW: Tensor, visibility: Visibility) -> Tensor:
        """Map [B, C, H, W], zero where hidden, to [B, width, H, W]."""
        x = self.norm(x_BCHW, visibility) if isinstance(self.norm, MaskedBatchNorm2d) else self.norm(x_BCHW)
        return self.project(torch.where(visibility.at(x) > 0, x, self.mask_token.to(x.dtype)[:, None, None]))


class UpBlock(nn.Sequential):
    """A transposed convolution to twice the height and width, and two convolutions with BatchNorm."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(c_in, c_in, 4, stride=2, padding=1),
            nn.Conv2d(c_in, c_in, 3, padding=1, bias=False),
            MaskedBatchNorm2d(c_in),
            nn.ReLU6(inplace=True),
            nn.Conv2d(c_in, c_out, 3, padding=1, bias=False),
            MaskedBatchNorm2d(c_out),
        )


class Decoder(nn.Module):
    """U-Net decoder: each block doubles height and width and halves the channels, which start at `width`.

    Before a block, the densified features of the stage with its height and width are added, as far
    as there is one. `stage_channels` are the encoder's from the first stage to the last. A cell of
    `cell` pixels per side, a power of two, needs log2(cell) blocks.
    """

    def __init__(self, stage_channels: list[int], cell: int, width: int, channels: int, layer_norm: bool, sync_bn: bool) -> None:
        super().__init__()
        widths = [width // 2**i for i in range(cell.bit_length())]
        self.blocks = nn.ModuleList([UpBlock(c_in, c_out) for c_in, c_out in itertools.pairwise(widths)])
        self.project = nn.Conv2d(widths[-1], channels, 1)
        self._initialise()
        deepest_first = enumerate(reversed(stage_channels))
        self.densify = nn.ModuleList([Densify(c, widths[i], layer_norm, deepest=i == 0) for i, c in deepest_first])
        synchronised(self, sync_bn)

    def _initialise(self) -> None:
        """Initialise as the authors' code does; it leaves the projections of features at torch's default."""
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, nn.ConvTranspose2d | nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, stages: list[Tensor], visibility: Visibility) -> Tensor:
        """Map the features of all stages, from the first to the last, to [B, channels, h cell, w cell]."""
        skips = [densify(x, visibility) for densify, x in zip(self.densify, reversed(stages), strict=True)]
        x = skips[0]
        for i, block in enumerate(self.blocks):
            x = block(x + skips[i] if 0 < i < len(skips) else x)
        out: Tensor = self.project(x)
        return out
