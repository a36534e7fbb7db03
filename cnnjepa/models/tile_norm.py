"""BatchNorm in training on the rows of tiles: torch's own, or the counted one where some tiles have no content.

Shapes: M rows of C channels.
"""

import torch
from torch import Tensor, nn

from cnnjepa.models import counted_norm
from cnnjepa.models.counted_norm import flat
from cnnjepa.models.tile_map import TileMap

aten = torch.ops.aten


def norm_forward(z_MC: Tensor, norm: nn.BatchNorm2d, tiles: TileMap, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Apply BatchNorm in training; return values, and mean and 1 / std for the backward pass."""
    if (count := tiles.with_content(side)) is not None:
        y, mean, inverse_std = counted_norm.forward(z_MC, norm, count)
        return tiles.clear(y, side), mean, inverse_std
    if len(z_MC) == 1:
        raise ValueError(f"BatchNorm needs more than 1 visible position in a micro-batch; got {len(z_MC)}")
    statistics = norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
    y, mean, inverse_std = aten.native_batch_norm(flat(z_MC), norm.weight, norm.bias, *statistics)
    return y.permute(0, 2, 3, 1).view_as(z_MC), mean, inverse_std


def norm_backward(
    g_MC: Tensor, z_MC: Tensor, w: Tensor, mean: Tensor, inverse_std: Tensor, tiles: TileMap, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of rows, weight and bias, each for `g_MC` behind `norm_forward`."""
    if (count := tiles.with_content(side)) is not None:
        to_z, to_w, to_b = counted_norm.backward(g_MC, z_MC, w, mean, inverse_std, count)
        return tiles.clear(to_z, side), to_w, to_b
    to_z, to_w, to_b = aten.native_batch_norm_backward(flat(g_MC), flat(z_MC), w, None, None, mean, inverse_std, True, 0.0, [True] * 3)
    return to_z.permute(0, 2, 3, 1).reshape_as(z_MC), to_w, to_b
