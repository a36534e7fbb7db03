"""Build the predictor and its ablation variants (paper, section III-C and table III).

It sees all cells, the hidden ones filled with the mask token, so its BatchNorm is ordinary.
"""

import itertools

import torch.nn.functional as F
from torch import Tensor, nn

from cnnjepa.config import PredictorConfig, PredictorConv
from cnnjepa.models.masked import MaskedBatchNorm2d, synchronised


class Pointwise(nn.Conv2d):
    """1x1 convolution as a matrix product, which is faster on maps as small as the grid."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 1)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Map [B, C, h, w] to [B, C', h, w], channels last in memory."""
        return F.linear(x_BChw.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def _layer(conv: PredictorConv, c_in: int, c_out: int, kernel: int) -> list[nn.Module]:
    """Return one layer as a flat list: spatial operation, channel mixing, BatchNorm and ReLU."""
    if conv is PredictorConv.dense:
        convs = [nn.Conv2d(c_in, c_out, kernel, padding="same")]
    elif conv is PredictorConv.pointwise:
        convs = [Pointwise(c_in, c_out)]
    else:
        convs = [nn.Conv2d(c_in, c_in, kernel, padding="same", groups=c_in), Pointwise(c_in, c_out)]
    return [*convs, MaskedBatchNorm2d(c_out), nn.ReLU(inplace=True)]


def build_predictor(config: PredictorConfig, channels: int, sync_bn: bool = False) -> nn.Sequential:
    """Build the predictor, which maps [B, channels, h, w] to the same shape, non-negative.

    It has 12.66 M parameters at the paper's 2048 channels and default depth.
    """
    hidden = max(round(channels * config.width), 1)
    sizes = [channels] + [hidden] * (config.depth - 1) + [channels]
    layers: list[nn.Module] = []
    for c_in, c_out in itertools.pairwise(sizes):
        layers += _layer(config.conv, c_in, c_out, config.kernel)
    return synchronised(nn.Sequential(*layers), sync_bn)
