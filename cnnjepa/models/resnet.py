"""ResNets with a masked forward pass (paper, section IV-A).

Keys (without `fc`) are torchvision's, the initialisation is timm's. One network serves as context
encoder, with a Visibility, and as target encoder, without. Masked execution is the reference;
models/tiles.py computes the same result from the visible cells alone.
"""

from functools import partial

import torch
from torch import Tensor, nn

from cnnjepa.config import EncoderConfig, EncoderName, Execution
from cnnjepa.models.masked import MaskedBatchNorm2d, Visibility, hide, masked_max_pool, needed, synchronised
from cnnjepa.models.tile_graphs import TileGraphs
from cnnjepa.models.tiles import ConvNorm, encode_stages, encode_tiles

# Cells of a micro-batch, hidden ones included, from which tiles pay. Below, the GPU waits for the
# host, which launches more kernels.
FEWEST_CELLS = {"cuda": 4096}


def _conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)


def _sum(y_BCHW: Tensor, shortcut_BCHW: Tensor) -> Tensor:
    """Add in place, unless gradients flow: `y` may then be a view, which is costly to write to."""
    return y_BCHW + shortcut_BCHW if y_BCHW.requires_grad else y_BCHW.add_(shortcut_BCHW)


class Downsample(nn.Sequential):
    """1x1 convolution and BatchNorm of a shortcut whose shape changes; keys `0` and `1`."""

    def forward(self, x_BCHW: Tensor, visibility: Visibility | None = None) -> Tensor:
        """Map [B, C, H, W] to [B, C', H/stride, W/stride]."""
        conv, norm = self
        return norm(hide(conv(x_BCHW), visibility), visibility)


class Block(nn.Module):
    """Convolutions `conv1`, `conv2` ... with norms `bn1`, `bn2` ..., and a shortcut."""

    expansion = 1  # of the channels, from the first convolution to the output

    def __init__(self, convs: list[nn.Conv2d], stride: int) -> None:
        super().__init__()
        for i, conv in enumerate(convs, start=1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", MaskedBatchNorm2d(conv.out_channels))
        self.relu = nn.ReLU(inplace=True)
        self.count, c_in, c_out = len(convs), convs[0].in_channels, convs[-1].out_channels
        same = stride == 1 and c_in == c_out
        self.downsample = None if same else Downsample(_conv(c_in, c_out, 1, stride), MaskedBatchNorm2d(c_out))

    @property
    def branch(self) -> list[ConvNorm]:
        """Return the convolutions beside the shortcut and their norms, in order."""
        return [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")) for i in range(1, self.count + 1)]

    def forward(self, x_BCHW: Tensor, visibility: Visibility | None) -> Tensor:
        """Map [B, C, H, W] to [B, C', H/stride, W/stride], non-negative."""
        shortcut = y = x_BCHW
        if self.downsample is not None:
            shortcut = self.downsample(x_BCHW, visibility)
        for i, (conv, norm) in enumerate(self.branch):
            y = norm(hide(conv(self.relu(y) if i else y), visibility), visibility)
        return self.relu(_sum(y, shortcut))


class BasicBlock(Block):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__([_conv(c_in, width, 3, stride), _conv(width, width, 3)], stride)


class Bottleneck(Block):
    """1x1, 3x3 (which carries the stride) and 1x1 convolutions and a shortcut."""

    expansion = 4
    widening = 1  # of the inner channels

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        c_out, width = width * self.expansion, width * self.widening
        super().__init__([_conv(c_in, width, 1), _conv(width, width, 3, stride), _conv(width, c_out, 1)], stride)


class WideBottleneck(Bottleneck):
    """A Bottleneck with twice the inner channels (Zagoruyko and Komodakis 2016)."""

    widening = 2


class ResNet(nn.Module):
    """Network from images [B, channels, H, W] to features [B, out_channels, H/cell, W/cell].

    With `small`, the stem is a 3x3 convolution of stride 2 without pooling, and there are three
    stages: 8 pixels per cell, so that a 32-pixel image has 4x4 cells. Otherwise stem and four
    stages are the usual ones, with 32 pixels per cell.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], stages: list[int], width: int = 64, small: bool = False, channels: int = 3
    ) -> None:
        super().__init__()
        self.small, self.cell = small, 8 if small else 32
        self.execution = Execution.tiled
        self.tile_graphs: TileGraphs | None = None  # runs the passes on tiles, if given
        self.conv1 = nn.Conv2d(channels, width, 3 if small else 7, 2, 1 if small else 3, bias=False)
        self.bn1 = MaskedBatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        c_in = width
        self.stage_names = [f"layer{i + 1}" for i in range(len(stages))]
        for i, (name, blocks) in enumerate(zip(self.stage_names, stages, strict=True)):
            layer = nn.ModuleList()
            for j in range(blocks):
                layer.append(block(c_in, width * 2**i, 2 if i > 0 and j == 0 else 1))
                c_in = width * 2**i * block.expansion
            self.add_module(name, layer)
        self.stage_channels = [width * 2**i * block.expansion for i in range(len(stages))]
        self.out_channels = c_in
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block):
                nn.init.zeros_(module.branch[-1][1].weight)  # so that a new block is the identity

    def blocks(self) -> list[Block]:
        """Return all residual blocks, in order."""
        return [block for stage in self.stages() for block in stage]

    def stages(self) -> list[list[Block]]:
        """Return the residual blocks of each stage, in order."""
        return [list(self.get_submodule(name).children()) for name in self.stage_names]  # type: ignore[arg-type]

    def forward(self, image_BCHW: Tensor, visibility: Visibility | None = None) -> Tensor:
        """Return the features, zero where hidden; raise ValueError if the mask does not fit."""
        visibility = needed(visibility, image_BCHW, self.cell)
        if self._takes_tiles(visibility):
            assert visibility is not None
            stem = self.conv1, self.bn1
            plain = partial(encode_tiles, stem, self.small, self.blocks(), image_BCHW, visibility)
            return plain() if self.tile_graphs is None else self.tile_graphs(image_BCHW, visibility, plain)
        x = self._stem(image_BCHW, visibility)
        for block in self.blocks():
            x = block(x, visibility)
        return x

    def stage_features(self, image_BCHW: Tensor, visibility: Visibility | None = None) -> list[Tensor]:
        """Return the features after each stage, the last of them those of `forward`.

        The stage before another has twice its height and width, and `stage_channels` has the channels.
        """
        visibility = needed(visibility, image_BCHW, self.cell)
        if self._takes_tiles(visibility):
            assert visibility is not None
            return encode_stages((self.conv1, self.bn1), self.small, self.stages(), image_BCHW, visibility)
        x, found = self._stem(image_BCHW, visibility), []
        for stage in self.stages():
            for block in stage:
                x = block(x, visibility)
            found.append(x)
        return found

    def _takes_tiles(self, visibility: Visibility | None) -> bool:
        """Return whether tiles pay: in training, without statistics shared with other ranks, and for enough cells."""
        tiled = self.execution is Execution.tiled and self.training and not self.bn1.is_synced()
        return tiled and visibility is not None and visibility.shape.numel() >= FEWEST_CELLS.get(visibility.device.type, 0)

    def _stem(self, image_BCHW: Tensor, visibility: Visibility | None) -> Tensor:
        x = hide(self.conv1(hide(image_BCHW, visibility)), visibility)
        x = self.relu(self.bn1(x, visibility))
        return x if self.small else masked_max_pool(x, visibility)


_STAGES: dict[EncoderName, tuple[type[BasicBlock | Bottleneck], list[int]]] = {
    EncoderName.resnet18: (BasicBlock, [2, 2, 2, 2]),
    EncoderName.resnet34: (BasicBlock, [3, 4, 6, 3]),
    EncoderName.resnet50: (Bottleneck, [3, 4, 6, 3]),
    EncoderName.resnet101: (Bottleneck, [3, 4, 23, 3]),
    EncoderName.resnet152: (Bottleneck, [3, 8, 36, 3]),
    EncoderName.resnet200: (Bottleneck, [3, 24, 36, 3]),
    EncoderName.wide_resnet50_2: (WideBottleneck, [3, 4, 6, 3]),
}


def build_encoder(config: EncoderConfig, generator_seed: int | None = None, channels: int = 3) -> ResNet:
    """Return a new encoder of images with so many channels. Its weights depend only on `generator_seed`, if that is given."""
    with torch.random.fork_rng(devices=[]):
        if generator_seed is not None:
            torch.manual_seed(generator_seed)
        if config.name is EncoderName.resnet_small:
            net = ResNet(BasicBlock, [config.blocks] * 3, config.width, small=True, channels=channels)
        else:
            net = ResNet(*_STAGES[config.name], channels=channels)
    net.execution = config.execution
    return synchronised(net, config.sync_bn)
