"""Keep hidden positions zero throughout a network (paper, section III-A).

Shapes: B images, C channels, H x W positions; h x w cells of the mask, of H/h x W/w positions.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Net = TypeVar("Net", bound=nn.Module)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy host `values` to `device` without making the host wait for work queued there."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def coordinates(cells: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Return image, row and column of each cell of a mask of `shape`, [B, h, w]; `cells` are flat indices [N]."""
    _, h, w = shape
    return cells.div(h * w, rounding_mode="floor"), cells.div(w, rounding_mode="floor") % h, cells % w


def positions(cells: Tensor, shape: torch.Size, height: int, width: int) -> Tensor:
    """Return the flat indices in [B, height, width] of the positions of the cells, cell by cell."""
    _, h, w = shape
    image, row, column = (c[:, None, None] for c in coordinates(cells, shape))
    down, right = (torch.arange(n, device=cells.device) for n in (height // h, width // w))
    rows = image * height + row * (height // h) + down[:, None]
    return (rows * width + column * (width // w) + right).flatten()


class Visibility:
    """The mask of one forward pass, at every resolution that the network requests."""

    def __init__(self, visible_Bhw: Tensor, device: torch.device | None = None) -> None:
        """Take a mask [B, h, w], True where visible. A host mask saves a CUDA synchronisation."""
        self.shape = visible_Bhw.shape
        self.device = visible_Bhw.device if device is None else device
        host = visible_Bhw.cpu()
        # Count on the host: counting on CUDA would make the host wait for all queued work.
        self.cells = to_device(host.flatten().nonzero().squeeze(1), self.device)
        self.hidden_cells = to_device((~host).flatten().nonzero().squeeze(1), self.device)
        self.fraction = len(self.cells) / host.numel()
        self.visible_Bhw = to_device(host, self.device)
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return image, row and column of each visible cell, each [N]."""
        return coordinates(self.cells, self.shape)

    def at(self, like_BCHW: Tensor) -> Tensor:
        """Return 1 where visible and 0 where hidden, [B, 1, H, W], in the dtype of `like_BCHW`.

        Raise ValueError unless H and W are multiples of h and w.
        """
        height, width = like_BCHW.shape[-2:]
        key = height, width, like_BCHW.dtype
        if key not in self._masks:
            _, h, w = self.shape
            if height % h or width % w:
                raise ValueError(f"a feature map must be a multiple of the mask's {h}x{w} cells; got {height}x{width}")
            visible_BHW = self.visible_Bhw.repeat_interleave(height // h, 1).repeat_interleave(width // w, 2)
            self._masks[key] = visible_BHW.unsqueeze(1).to(like_BCHW.dtype)
        return self._masks[key]

    def positions(self, height: int, width: int) -> Tensor:
        """Return the flat indices of visible positions in [B, height, width], cell by cell."""
        key = height, width
        if key not in self._positions:
            self._positions[key] = positions(self.cells, self.shape, height, width)
        return self._positions[key]


def needed(visibility: Visibility | None, image_BCHW: Tensor, cell: int) -> Visibility | None:
    """Return `visibility`, or None if it hides nothing.

    Raise ValueError unless it has one cell for each `cell` x `cell` pixels.
    """
    if visibility is None:
        return None
    b, _, height, width = image_BCHW.shape
    if visibility.shape != (b, height // cell, width // cell) or height % cell or width % cell:
        shown = "x".join(map(str, visibility.shape))
        raise ValueError(f"a mask must have a cell for each {cell}x{cell} pixels of {b} images of {height}x{width}; got {shown} cells")
    return None if visibility.fraction == 1 else visibility


def hide(x_BCHW: Tensor, visibility: Visibility | None) -> Tensor:
    """Return `x_BCHW` with zeros at hidden positions, or `x_BCHW` itself without a mask."""
    return x_BCHW if visibility is None else x_BCHW * visibility.at(x_BCHW)


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with the statistics of the visible positions; nn.BatchNorm2d if all are visible.

    Hidden positions must be zero in the input and are zero in the output. The running variance is
    unbiased over the visible count. With `sync` set, statistics are those of all ranks together.
    """

    sync = False

    def is_synced(self) -> bool:
        """Return whether there are other ranks to share statistics with."""
        return self.sync and dist.is_initialized() and dist.get_world_size() > 1

    def forward(self, x_BCHW: Tensor, visibility: Visibility | None = None) -> Tensor:
        """Map [B, C, H, W] to the same shape; without `visibility` all positions are visible."""
        synced = self.training and self.is_synced()
        if visibility is None and not synced:
            return super().forward(x_BCHW)
        if not self.training:
            return hide(super().forward(x_BCHW), visibility)
        b, c, h, w = x_BCHW.shape
        x_NC = x_BCHW.permute(0, 2, 3, 1).reshape(-1, c)
        visible_NC = x_NC if visibility is None else x_NC.index_select(0, visibility.positions(h, w))
        y_NC = self._over_ranks(visible_NC) if synced else self._over_rows(visible_NC)
        if visibility is not None:
            y_NC = torch.zeros_like(x_NC).index_copy(0, visibility.positions(h, w), y_NC)
        return y_NC.view(b, h, w, c).permute(0, 3, 1, 2)

    def _over_rows(self, x_NC: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        return F.batch_norm(x_NC, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps)

    def _over_ranks(self, x_NC: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        y_NC, mean, unbiased = _NormOverRanks.apply(x_NC, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
        return y_NC


def synchronised(net: Net, sync_bn: bool) -> Net:
    """Set whether each BatchNorm of `net` has the statistics of all ranks; return `net`."""
    for module in net.modules():
        if isinstance(module, MaskedBatchNorm2d):
            module.sync = sync_bn
    return net


class _NormOverRanks(torch.autograd.Function):
    """BatchNorm over the rows of all ranks together.

    Each layer sends three messages per pass, and keeps no more memory than BatchNorm.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = weight.dtype
        sums = torch.cat([x_NC.sum(0, dtype=wide), weight.new_full((1,), len(x_NC))])
        dist.all_reduce(sums)
        mean, count = sums[:-1] / sums[-1], sums[-1]
        squares = (x_NC - mean).square().sum(0)
        dist.all_reduce(squares)
        inverse_std = (squares / count + eps).rsqrt()
        y_NC = torch.addcmul(bias, x_NC - mean, inverse_std * weight).to(x_NC.dtype)
        unbiased = squares / (count - 1).clamp_min(1)
        ctx.save_for_backward(x_NC, weight, mean, inverse_std, count)
        ctx.mark_non_differentiable(mean, unbiased)
        return y_NC, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NC: Tensor, *_: Any) -> tuple[Any, ...]:
        x_NC, weight, mean, inverse_std, count = ctx.saved_tensors
        normal = (x_NC - mean) * inverse_std
        to_bias, to_weight = g_NC.sum(0, dtype=weight.dtype), (g_NC * normal).sum(0)
        sums = torch.stack([to_bias, to_weight])
        dist.all_reduce(sums)  # every rank's loss depends on this rank's rows
        to_x = (g_NC - (sums[0] + normal * sums[1]) / count) * (inverse_std * weight)
        return to_x.to(x_NC.dtype), to_weight, to_bias, None


def masked_max_pool(x_BCHW: Tensor, visibility: Visibility | None) -> Tensor:
    """Apply 3x3 max-pooling of stride 2. The zeros of hidden positions are neutral after a ReLU."""
    return hide(F.max_pool2d(x_BCHW, 3, 2, 1), visibility)
