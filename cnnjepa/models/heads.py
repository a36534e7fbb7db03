"""Build the fully connected heads of the joint-embedding methods."""

import itertools

from torch import Tensor, nn

from cnnjepa.models.masked import MaskedBatchNorm2d, Visibility, synchronised


class HeadNorm(MaskedBatchNorm2d):
    """BatchNorm of vectors, synchronised over ranks as in the encoder.

    On one rank it equals nn.BatchNorm1d.
    """

    def forward(self, x_BD: Tensor, visibility: Visibility | None = None) -> Tensor:
        """Map [B, D] to the same shape."""
        return super().forward(x_BD[:, :, None, None], visibility).flatten(1)


def build_head(sizes: list[int], sync_bn: bool, last_norm: bool = False) -> nn.Sequential:
    """Build linear layers with BatchNorm and ReLU between them: [B, sizes[0]] to [B, sizes[-1]].

    `last_norm` adds a BatchNorm at the end. A layer before a BatchNorm has no bias, because the
    BatchNorm would remove it.
    """
    layers: list[nn.Module] = []
    last = len(sizes) - 2
    for i, (d_in, d_out) in enumerate(itertools.pairwise(sizes)):
        normed = i < last or last_norm
        layers.append(nn.Linear(d_in, d_out, bias=not normed))
        layers += [HeadNorm(d_out)] * normed + [nn.ReLU(inplace=True)] * (i < last)
    return synchronised(nn.Sequential(*layers), sync_bn)
