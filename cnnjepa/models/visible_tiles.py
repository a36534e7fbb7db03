"""Layers of any CNN on tiles: what models/visible_plan.py puts in the place of a network's own layers.

models/tiles.py knows the layers of this project's ResNets. Here are those of other networks: grouped
convolutions, wide kernels, pools, GroupNorm, and sums over one image.

A map is held as `flat`: [1, C, M, 1] in channels-last memory, one row for each visible position. Layers
that look at one position at a time (BatchNorm, activations, sums, concatenation) need no code of their
own: torch's run on it as on an image, and see only what is visible.

Shapes: B images, N tiles, S positions per side, M = N x S x S rows, C and D channels in and out.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cnnjepa.models import tiles as ours
from cnnjepa.models.counted_norm import flat
from cnnjepa.models.masked import Visibility
from cnnjepa.models.tile_map import TileMap

# Convolutions that models/tiles.py does not know run on the whole map where all windows together hold more positions than this
# times the map's. Measured on Zen 3: of depthwise and grouped kernels of 3, 5 and 7, windows win below 1.3 and lose above 1.6.
WHOLE = 1.6


@dataclass(frozen=True)
class Reach:
    """Where a square kernel reads: the same in both directions."""

    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def span(self) -> int:
        """Return the positions from the first tap to the last, both included."""
        return (self.kernel - 1) * self.dilation + 1

    @property
    def edges(self) -> tuple[int, int]:
        """Return how many positions before and after a tile are read; negative if some of the tile are not."""
        return self.padding, self.span - self.padding - self.stride

    def fits(self, ceil: bool = False) -> bool:
        """Return whether each tile's outputs are its own: the map becomes `stride` times smaller, exactly."""
        left = 2 * self.padding - self.span
        if not ceil:
            return -self.stride <= left < 0
        # torch drops a last window that would begin in the padding behind the image.
        return -2 * self.stride < left <= -self.stride or (self.padding == 0 and left < 0 and left > -self.stride)

    @property
    def symmetric(self) -> bool:
        """Return whether the gradient is a convolution that reaches as far."""
        return self.stride == 1 and 2 * self.padding == self.span - 1


class WideTileMap(TileMap):
    """A TileMap whose windows may reach beyond the next tile, and tell hidden positions from those outside the image."""

    def __init__(self, visibility: Visibility) -> None:
        super().__init__(visibility)
        self.visibility = visibility
        self.image = visibility.coordinates()[0]  # [N]
        tiles = torch.zeros(self.shape[0], dtype=torch.long, device=self.image.device)
        self.per_image = tiles.index_add_(0, self.image, torch.ones_like(self.image))  # [B] tiles

    @staticmethod
    def radius(side: int, before: int, after: int) -> int:
        """Return how many tiles away a window reaches."""
        return max(0, -(-before // side), -(-after // side))

    def ring(self, radius: int) -> Tensor:
        """Return the numbers of the tiles around each, [N, 2 radius + 1, 2 radius + 1]: N if hidden, N + 1 if outside."""
        key = (radius,)
        if key not in self._known:
            self._known[key] = self.neighbours(radius, self.count + 1)
        return self._known[key]

    def halo(self, side: int, before: int, after: int) -> Tensor:
        """Return the rows behind each tile and its edges, [N + padding, W, W]: M where hidden, M + 1 outside of the image."""
        key = side, before, after, 2, 0
        if key not in self._known:
            radius, end = self.radius(side, before, after), self.count * side**2
            reach = torch.arange(-before, side + after, device=self.cells.device)
            step, inside = reach.div(side, rounding_mode="floor") + radius, reach % side
            tile = self.ring(radius)[:, step[:, None], step[None]]
            row = tile * side**2 + inside[:, None] * side + inside[None]
            row = torch.where(tile >= self.count, end + tile - self.count, row)
            self._known[key] = F.pad(row, (0, 0, 0, 0, 0, self.padding), value=end)
        return self._known[key]


def rows(x_1CM1: Tensor) -> Tensor:
    """View a flat map as rows, [M, C]."""
    return x_1CM1.permute(0, 2, 3, 1).reshape(-1, x_1CM1.shape[1])


def _read(x_MC: Tensor, tiles: WideTileMap, side: int, edges: tuple[int, int], outside: float = 0) -> Tensor:
    """Return the windows of all tiles, [N + padding, C, W, W]: zero where hidden."""
    index, c = tiles.halo(side, *edges), x_MC.shape[1]
    beyond = torch.stack([x_MC.new_zeros(c), x_MC.new_full((c,), outside)])
    return torch.cat([x_MC, beyond]).index_select(0, index.flatten()).view(*index.shape, c).permute(0, 3, 1, 2)


def _overlap(step: int, side: int, before: int, after: int) -> tuple[slice, slice]:
    """Return which positions of a tile the window of the tile `step` further on reads, and where in that window they are."""
    low, high = max(0, step * side - before), min(side, (step + 1) * side + after)
    shift = before - step * side
    return slice(low, max(low, high)), slice(low + shift, max(low, high) + shift)


def _fold(g_NCWW: Tensor, tiles: WideTileMap, side: int, before: int, after: int) -> Tensor:
    """Add the gradients of windows to the positions that they read; return rows."""
    radius = tiles.radius(side, before, after)
    ring = tiles.ring(radius).clamp_max(tiles.count)
    g_NCWW = g_NCWW[: tiles.count]
    total = torch.zeros_like(g_NCWW[:, :, :1, :1]).expand(-1, -1, side, side).contiguous(memory_format=torch.channels_last)
    spans = [(step, *_overlap(step, side, before, after)) for step in range(-radius, radius + 1)]
    spans = [span for span in spans if span[1].start < span[1].stop]
    for down, y, from_y in spans:
        for right, x, from_x in spans:
            part = g_NCWW[:, :, from_y, from_x]
            if down or right:
                part = torch.cat([part, part.new_zeros(1, *part.shape[1:])]).index_select(0, ring[:, radius + down, radius + right])
            total[:, :, y, x] += part
    return ours._as_rows(total)


def _windows(x_1CM1: Tensor, tiles: WideTileMap, side: int, reach: Reach, outside: float = 0) -> Tensor:
    """Return what a kernel reads for each tile, [N, C, W, W]."""
    if reach.edges == (0, 0):
        return ours._as_tiles(rows(x_1CM1), side)
    return _Windows.apply(rows(x_1CM1), tiles, side, reach.edges, outside)


class _Windows(torch.autograd.Function):
    """Tiles with their edges, [N, C, W, W], of rows [M, C]."""

    @staticmethod
    def forward(ctx: Any, x_MC: Tensor, tiles: WideTileMap, side: int, edges: tuple[int, int], outside: float) -> Tensor:
        ctx.where = tiles, side, edges
        return _read(x_MC, tiles, side, edges, outside)[: tiles.count]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_NCWW: Tensor) -> tuple[Any, ...]:
        tiles, side, edges = ctx.where
        return _fold(g_NCWW, tiles, side, *edges), None, None, None, None


def _turned(w: Tensor, groups: int) -> Tensor:
    """Return the kernels of the gradient of a convolution: turned round, inputs and outputs exchanged in each group."""
    d, c, k, _ = w.shape
    turned = w.flip(2, 3).view(groups, d // groups, c, k, k).transpose(1, 2).reshape(groups * c, d // groups, k, k)
    return turned.contiguous(memory_format=torch.channels_last)


class _Conv(torch.autograd.Function):
    """A convolution of rows without bias, whose gradient reads windows too instead of adding to them."""

    @staticmethod
    def forward(ctx: Any, x_MC: Tensor, w: Tensor, tiles: WideTileMap, side: int, reach: Reach, groups: int) -> Tensor:
        ctx.save_for_backward(x_MC, w)
        ctx.where = tiles, side, reach, groups
        with torch.autocast(x_MC.device.type, enabled=False):
            cast = ours._cast(w, x_MC)
            if _is_ours(reach, groups, w):
                return ours._forward(x_MC, cast, tiles, side, reach.stride)
            window = _read(x_MC, tiles, side, reach.edges)
            return ours._as_rows(F.conv2d(window, cast, None, 1, 0, reach.dilation, groups)[: tiles.count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_MD: Tensor) -> tuple[Any, ...]:
        (x_MC, w), (tiles, side, reach, groups) = ctx.saved_tensors, ctx.where
        with torch.autocast(x_MC.device.type, enabled=False):
            cast, g_MD = ours._cast(w, x_MC), g_MD.contiguous()
            if _is_ours(reach, groups, w):
                to_x, to_w = ours._backward(g_MD, x_MC, cast, tiles, side, reach.stride)
            else:
                to_x, to_w = _conv_backward(g_MD, x_MC, cast, tiles, side, reach, groups)
        return to_x, to_w.to(w.dtype), None, None, None, None


def _conv_backward(
    g_MD: Tensor, x_MC: Tensor, w: Tensor, tiles: WideTileMap, side: int, reach: Reach, groups: int
) -> tuple[Tensor, Tensor]:
    window = _read(g_MD, tiles, side, reach.edges)
    to_x = ours._as_rows(F.conv2d(window, _turned(w, groups), None, 1, 0, reach.dilation, groups)[: tiles.count])
    window, dilation = _read(x_MC, tiles, side, reach.edges)[: tiles.count], [reach.dilation] * 2
    g = ours._as_tiles(g_MD, side)
    _, to_w, _ = ours.aten.convolution_backward(g, window, w, None, [1, 1], [0, 0], dilation, False, [0, 0], groups, [False, True, False])
    return to_x, to_w


def _is_ours(reach: Reach, groups: int, w: Tensor) -> bool:
    """Return whether models/tiles.py has kernels for this convolution."""
    if groups > 1 or (reach.dilation > 1 and reach.kernel > 1):
        return False
    return (reach.kernel, reach.padding) == (1, 0) or ((reach.kernel, reach.padding) == (3, 1) and reach.stride <= 2)


class _Spread(torch.autograd.Function):
    """Rows put where they belong in zeros, [positions, C]."""

    @staticmethod
    def forward(ctx: Any, x_MC: Tensor, at_M: Tensor, positions: int) -> Tensor:
        ctx.save_for_backward(at_M)
        return x_MC.new_zeros(positions, x_MC.shape[1]).index_copy_(0, at_M, x_MC)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_PC: Tensor) -> tuple[Any, ...]:
        return g_PC.index_select(0, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    """The rows at some positions, each of them once."""

    @staticmethod
    def forward(ctx: Any, x_PC: Tensor, at_M: Tensor) -> Tensor:
        ctx.save_for_backward(at_M)
        ctx.positions = len(x_PC)
        return x_PC.index_select(0, at_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_MC: Tensor) -> tuple[Any, ...]:
        return _Spread.apply(g_MC, *ctx.saved_tensors, ctx.positions), None


def _is_whole(tiles: WideTileMap, side: int, reach: Reach) -> bool:
    """Return whether the windows of all tiles hold so many positions that the whole map costs less."""
    return tiles.count * (side + sum(reach.edges)) ** 2 > WHOLE * tiles.shape.numel() * side**2


def _conv_whole(x_1CM1: Tensor, w: Tensor, tiles: WideTileMap, side: int, reach: Reach, groups: int) -> Tensor:
    """Return the rows of a convolution of the whole map, with zeros where hidden: masked execution."""
    (b, h, width), after = tiles.shape, side // reach.stride
    into = tiles.visibility.positions(h * side, width * side)
    x_PC = _Spread.apply(rows(x_1CM1), into, tiles.shape.numel() * side**2)
    x_BCHW = x_PC.view(b, h * side, width * side, -1).permute(0, 3, 1, 2)
    y_BDHW = F.conv2d(x_BCHW, w, None, reach.stride, reach.padding, reach.dilation, groups)
    return _Gather.apply(ours._as_rows(y_BDHW), tiles.visibility.positions(h * after, width * after))


def conv(x_1CM1: Tensor, w: Tensor, bias: Tensor | None, tiles: WideTileMap, side: int, reach: Reach, groups: int) -> Tensor:
    """Return the convolution of a flat map, flat."""
    dtype = ours.computed_in(x_1CM1)
    x_1CM1 = x_1CM1.to(dtype)
    kernels = w.to(dtype).contiguous(memory_format=torch.channels_last)
    if _is_ours(reach, groups, w) or (reach.symmetric and not _is_whole(tiles, side, reach)):
        y_MD = _Conv.apply(rows(x_1CM1), w, tiles, side, reach, groups)
    elif _is_whole(tiles, side, reach):
        y_MD = _conv_whole(x_1CM1, kernels, tiles, side, reach, groups)
    else:
        window = _windows(x_1CM1, tiles, side, reach)
        y_MD = ours._as_rows(F.conv2d(window, kernels, None, reach.stride, 0, reach.dilation, groups))
    return flat(y_MD if bias is None else y_MD + bias.to(dtype))


def conv_image(image_BCHW: Tensor, w: Tensor, bias: Tensor | None, tiles: WideTileMap, side: int, reach: Reach, groups: int) -> Tensor:
    """Return the convolution of a masked image, flat. Its windows are cut from the image itself."""
    dtype, (before, after) = ours.computed_in(image_BCHW), reach.edges
    padded = F.pad(image_BCHW.to(dtype), (before, after, before, after)).permute(0, 2, 3, 1)
    width = side + before + after
    image, row, column = tiles.visibility.coordinates()
    windows = padded.unfold(1, width, side).unfold(2, width, side)[image, row, column]  # [N, C, W, W]
    windows = ours._padded(windows, tiles).contiguous(memory_format=torch.channels_last)
    kernels = w.to(dtype).contiguous(memory_format=torch.channels_last)
    y = F.conv2d(windows, kernels, None if bias is None else bias.to(dtype), reach.stride, 0, reach.dilation, groups)
    return flat(ours._as_rows(y[: tiles.count]))


def flat_image(image_BCHW: Tensor, tiles: WideTileMap) -> Tensor:
    """Return the visible pixels of an image, flat."""
    _, c, height, width = image_BCHW.shape
    return flat(image_BCHW.permute(0, 2, 3, 1).reshape(-1, c).index_select(0, tiles.visibility.positions(height, width)))


def max_pool(x_1CM1: Tensor, tiles: WideTileMap, side: int, reach: Reach) -> Tensor:
    """Return the largest values, flat. Hidden positions count as zeros; those outside the image do not count."""
    window = _windows(x_1CM1, tiles, side, reach, -torch.inf)
    return flat(ours._as_rows(F.max_pool2d(window, reach.kernel, reach.stride, 0, reach.dilation)))


def average_pool(x_1CM1: Tensor, tiles: WideTileMap, side: int, reach: Reach, count_outside: bool) -> Tensor:
    """Return the averages, flat. Hidden positions count as zeros, and those outside the image too if asked."""
    window = _windows(x_1CM1, tiles, side, reach)
    y = F.avg_pool2d(window, reach.kernel, reach.stride)
    if not count_outside and any(edge > 0 for edge in reach.edges):
        inside = tiles.halo(side, *reach.edges)[: tiles.count] <= tiles.count * side**2
        y = y / F.avg_pool2d(inside[:, None].to(y.dtype), reach.kernel, reach.stride)
    return flat(ours._as_rows(y))


def _by_tile(x_1CM1: Tensor, tiles: WideTileMap) -> Tensor:
    """View a flat map as [N, S x S, C]."""
    return rows(x_1CM1).view(tiles.count, -1, x_1CM1.shape[1])


def _wide(x: Tensor) -> torch.dtype:
    """Return a dtype to add many values in."""
    return torch.promote_types(x.dtype, torch.float32)


def image_sum(x_1CM1: Tensor, tiles: WideTileMap) -> Tensor:
    """Return the sum over the visible positions of each image, [B, C]; zero if none are visible."""
    sums_NC = _by_tile(x_1CM1, tiles).sum(1, dtype=_wide(x_1CM1))
    return sums_NC.new_zeros(tiles.shape[0], sums_NC.shape[1]).index_add(0, tiles.image, sums_NC)


def image_mean(x_1CM1: Tensor, tiles: WideTileMap) -> Tensor:
    """Return the mean over the visible positions of each image, [B, C]; zero if none are visible."""
    positions = x_1CM1.shape[2] // tiles.count * tiles.per_image.clamp_min(1)
    return (image_sum(x_1CM1, tiles) / positions[:, None]).to(x_1CM1.dtype)


def image_norm(x_1CM1: Tensor, tiles: WideTileMap) -> Tensor:
    """Return the L2 norm over the visible positions of each image, [B, C]; its gradient at zero is zero, as torch's."""
    squares = image_sum(x_1CM1.square(), tiles)
    return torch.where(squares > 0, squares.where(squares > 0, 1).sqrt(), 0).to(x_1CM1.dtype)


def for_positions(value_BC: Tensor, tiles: WideTileMap, side: int) -> Tensor:
    """Repeat each image's values for all of its visible positions; return a flat map."""
    return flat(value_BC.index_select(0, tiles.image)[:, None].expand(-1, side**2, -1).reshape(-1, value_BC.shape[1]))


def group_norm(x_1CM1: Tensor, tiles: WideTileMap, groups: int, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    """Return GroupNorm, whose statistics are over the visible positions of each image and the channels of each group."""
    c, dtype = x_1CM1.shape[1], _wide(x_1CM1)
    x_NPGK = _by_tile(x_1CM1, tiles).to(dtype).unflatten(2, (groups, c // groups))
    per_group = (tiles.per_image.clamp_min(1) * (x_NPGK.shape[1] * c // groups))[:, None]

    def of_images(values_NG: Tensor) -> Tensor:
        """Average over each image; return this for each tile, [N, 1, G, 1]."""
        means_BG = values_NG.new_zeros(tiles.shape[0], groups).index_add(0, tiles.image, values_NG) / per_group
        return means_BG.index_select(0, tiles.image)[:, None, :, None]

    centred = x_NPGK - of_images(x_NPGK.sum((1, 3)))
    y = centred * (of_images(centred.square().sum((1, 3))) + eps).rsqrt()
    y_MC = y.reshape(-1, c)
    if w is not None:
        y_MC = y_MC * w if b is None else torch.addcmul(b, y_MC, w)
    return flat(y_MC.to(x_1CM1.dtype))
