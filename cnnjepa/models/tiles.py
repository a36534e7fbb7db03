"""Compute only the visible cells, with the result of masked execution: tiled execution.

The visible cells of a batch are packed one after another, each a tile of S x S positions. Every
stride halves S, down to 1. Activations are rows [M, C], one per position, channels last; M is N x S
x S. On rows without hidden positions, a 1x1 convolution is a matrix product, and BatchNorm, ReLU
and sums are the ordinary ones. Only a wider kernel looks over the edge of its tile: it reads the
neighbouring tile if that is visible, else zeros, which masked execution holds there.
docs/how-it-works/tiles.md says why this is exact and what it costs.

Shapes: N tiles, S positions per side, M rows, C and D channels in and out, K x K kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cnnjepa.models import counted_norm
from cnnjepa.models.counted_norm import flat
from cnnjepa.models.masked import MaskedBatchNorm2d, Visibility, coordinates
from cnnjepa.models.tile_map import TileMap
from cnnjepa.models.tile_norm import norm_backward, norm_forward

aten = torch.ops.aten
ConvNorm: TypeAlias = tuple[nn.Conv2d, MaskedBatchNorm2d]
_ONE, _NONE = [1, 1], [0, 0]


@dataclass(frozen=True)
class Kernels:
    """Largest side of output tiles for each kind of arithmetic. Larger ones convolve windows."""

    product: int  # 1x1: a matrix product, else a convolution
    taps: tuple[int, int] = (0, 0)  # one product a tap over the visible pairs alone, for stride 1 and 2
    patches: int = 0  # one product of all taps
    weight_patches: int = 0  # the same for the weight's gradient alone


# Measured on Zen 4 with oneDNN and MKL, and on an H100, where a convolution for each 1x1 takes the
# encoder 2.6 times as long, and windows alone 1.2 times (tests/benchmarks/encoder.py). For taps,
# CUDA's host would have to know how many pairs each has.
CPU = {torch.float32: Kernels(2, (2, 2)), torch.float64: Kernels(2, (2, 2)), torch.bfloat16: Kernels(8, (2, 2), 0, 4)}
CUDA = Kernels(product=64, patches=2, weight_patches=2)


def _kernels(x_MC: Tensor) -> Kernels:
    return CUDA if x_MC.is_cuda else CPU.get(x_MC.dtype, CPU[torch.float32])


def _as_tiles(x_MC: Tensor, side: int) -> Tensor:
    """View [M, C] as [N, C, S, S] in channels-last memory."""
    return x_MC.view(-1, side, side, x_MC.shape[1]).permute(0, 3, 1, 2)


def _as_rows(x_NCSS: Tensor) -> Tensor:
    """Invert `_as_tiles`; copy if the memory is not channels-last."""
    return x_NCSS.permute(0, 2, 3, 1).reshape(-1, x_NCSS.shape[1])


def _cast(w: Tensor, x_MC: Tensor) -> Tensor:
    """Return the weight in the dtype of `x_MC`. The backward pass casts again: no copy is kept."""
    return w.to(x_MC.dtype, memory_format=torch.channels_last)


def _read(x_MC: Tensor, rows: Tensor) -> Tensor:
    """Return the chosen rows; zeros for the row after the last."""
    return torch.cat([x_MC, x_MC.new_zeros(1, x_MC.shape[1])]).index_select(0, rows.flatten())


def _read_window(x_MC: Tensor, tiles: TileMap, side: int, before: int, after: int) -> Tensor:
    return _as_tiles(_read(x_MC, tiles.window(side, before, after)), side + before + after)


def _padded(x: Tensor, tiles: TileMap) -> Tensor:
    """Append `padding` tiles of zeros to [N, ...]."""
    return F.pad(x, [0, 0] * (x.ndim - 1) + [0, tiles.padding]) if tiles.padding else x  # else it would be copied


def _thin(x_MC: Tensor, side: int, stride: int) -> Tensor:
    """Return every `stride`-th position of each tile, in both directions."""
    return x_MC if stride == 1 else x_MC.view(-1, side, side, x_MC.shape[1])[:, ::stride, ::stride].reshape(-1, x_MC.shape[1])


def _fold(g_NCWW: Tensor, tiles: TileMap) -> Tensor:
    """Add the gradients of windows to the tiles that they read; return rows.

    A window reaches one position before its tile and none after.
    """
    g_NCWW = g_NCWW[: tiles.count]
    g_NCSS = g_NCWW[:, :, 1:, 1:].contiguous(memory_format=torch.channels_last)

    def from_neighbours(edge: Tensor, down: int, right: int) -> Tensor:
        return torch.cat([edge, edge.new_zeros(1, *edge.shape[1:])]).index_select(0, tiles.around[:, 1 + down, 1 + right])

    g_NCSS[:, :, -1] += from_neighbours(g_NCWW[:, :, 0, 1:], 1, 0)
    g_NCSS[:, :, :, -1] += from_neighbours(g_NCWW[:, :, 1:, 0], 0, 1)
    g_NCSS[:, :, -1, -1] += from_neighbours(g_NCWW[:, :, 0, 0], 1, 1)
    return _as_rows(g_NCSS)


def _pointwise_backward(g_MD: Tensor, x_MC: Tensor, w: Tensor, side: int, add_to: Tensor | None) -> tuple[Tensor, Tensor]:
    if side <= _kernels(x_MC).product:
        to_w = (g_MD.t() @ x_MC).view_as(w)
        return (g_MD @ w.flatten(1) if add_to is None else torch.addmm(add_to, g_MD, w.flatten(1), out=add_to)), to_w
    to_x, to_w = _conv_backward(_as_tiles(g_MD, side), _as_tiles(x_MC, side), w, 1, True)
    return (_as_rows(to_x) if add_to is None else add_to.add_(_as_rows(to_x))), to_w


def _conv_backward(g: Tensor, x: Tensor, w: Tensor, stride: int, input_too: bool) -> tuple[Tensor, Tensor]:
    to_x, to_w, _ = aten.convolution_backward(g, x, w, None, [stride] * 2, _NONE, _ONE, False, _NONE, 1, [input_too, True, False])
    return to_x, to_w


def _wide_forward(x_MC: Tensor, w: Tensor, tiles: TileMap, side: int, stride: int) -> Tensor:
    k, kernels = w.shape[-1], _kernels(x_MC)
    if side // stride <= kernels.taps[stride - 1]:
        taps = tiles.taps(side, k, stride)
        w_TCD = w.permute(2, 3, 1, 0).reshape(k * k, w.shape[1], w.shape[0])
        products = x_MC.new_empty(taps.count, w.shape[0])
        for (_, into), w_CD, product in zip(taps.pairs, w_TCD, products.split(taps.sizes), strict=True):
            torch.mm(x_MC.index_select(0, into), w_CD, out=product)
        return taps.total(products, taps.by_output)
    if side // stride <= kernels.patches:
        patches = _read(x_MC, tiles.patches(side, k, stride)).view(-1, k * k * x_MC.shape[1])
        return patches @ w.permute(2, 3, 1, 0).reshape(-1, w.shape[0])
    return _as_rows(F.conv2d(_read_window(x_MC, tiles, side, k // 2, k // 2 - stride + 1), w, None, stride)[: tiles.count])


def _wide_backward(g_MD: Tensor, x_MC: Tensor, w: Tensor, tiles: TileMap, side: int, stride: int) -> tuple[Tensor, Tensor]:
    k, (d, c), kernels = w.shape[-1], w.shape[:2], _kernels(x_MC)
    if side // stride <= kernels.taps[stride - 1]:
        taps = tiles.taps(side, k, stride)
        w_TDC = w.permute(2, 3, 0, 1).reshape(k * k, d, c)
        to_w, products = torch.empty_like(w_TDC), g_MD.new_empty(taps.count, c)
        for (out, into), w_DC, to_w_DC, product in zip(taps.pairs, w_TDC, to_w, products.split(taps.sizes), strict=True):
            g = g_MD.index_select(0, out)
            torch.mm(g, w_DC, out=product)
            torch.mm(g.t(), x_MC.index_select(0, into), out=to_w_DC)
        return taps.total(products, taps.by_input), to_w.view(k, k, d, c).permute(2, 3, 0, 1)
    g = _as_tiles(_padded(g_MD.view(tiles.count, -1, d), tiles).view(-1, d), side // stride)
    if stride > 1:
        to_x, to_w = _conv_backward(g, _read_window(x_MC, tiles, side, k // 2, k // 2 - stride + 1), w, stride, True)
        return _fold(to_x, tiles), to_w
    # The gradient is its convolution with the turned kernel, and reads the same neighbours.
    turned = w.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
    to_x = _as_rows(F.conv2d(_read_window(g_MD, tiles, side, k // 2, k // 2), turned)[: tiles.count])
    if side <= kernels.weight_patches:
        to_w = (g_MD.t() @ _read(x_MC, tiles.patches(side, k, 1)).view(-1, k * k * c)).view(d, k, k, c).permute(0, 3, 1, 2)
    else:
        to_w = _conv_backward(g, _read_window(x_MC, tiles, side, k // 2, k // 2), w, 1, False)[1]
    return to_x, to_w


def _forward(x_MC: Tensor, w: Tensor, tiles: TileMap, side: int, stride: int) -> Tensor:
    if w.shape[-1] > 1:
        return _wide_forward(x_MC, w, tiles, side, stride)
    x_MC, side = _thin(x_MC, side, stride), side // stride
    return x_MC @ w.flatten(1).t() if side <= _kernels(x_MC).product else _as_rows(F.conv2d(_as_tiles(x_MC, side), w))


def _backward(
    g_MD: Tensor, x_MC: Tensor, w: Tensor, tiles: TileMap, side: int, stride: int, add_to: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of input and weight; add the input's to `add_to`, if given, in place."""
    if w.shape[-1] > 1:
        to_x, to_w = _wide_backward(g_MD, x_MC, w, tiles, side, stride)
        return (to_x if add_to is None else add_to.add_(to_x)), to_w
    if stride == 1:
        return _pointwise_backward(g_MD, x_MC, w, side, add_to)
    to_thin, to_w = _pointwise_backward(g_MD, _thin(x_MC, side, stride), w, side // stride, None)
    to_x = x_MC.new_zeros(x_MC.shape) if add_to is None else add_to
    to_x.view(-1, side, side, x_MC.shape[1])[:, ::stride, ::stride] += to_thin.view(-1, side // stride, side // stride, x_MC.shape[1])
    return to_x, to_w


@dataclass(frozen=True)
class _Layer:
    """A convolution and its norm, on tiles of `side`."""

    conv: nn.Conv2d
    norm: MaskedBatchNorm2d
    side: int

    @property
    def stride(self) -> int:
        return self.conv.stride[0]


class _Residual(torch.autograd.Function):
    """A residual block: takes ReLU's gradient in place, adds the shortcut's within a product.

    Inputs: rows, tiles, layers (the branch's, then the shortcut's if it has one), length of the
    branch, whether nothing else reads the output's gradient, weights of the convolutions, then
    weights and biases of the norms.
    """

    @staticmethod
    def forward(ctx: Any, x_MC: Tensor, tiles: TileMap, layers: list[_Layer], branch: int, owns: bool, *parameters: Tensor) -> Tensor:
        saved: list[Tensor] = []
        outputs: list[Tensor] = []
        for i, (layer, w) in enumerate(zip(layers, parameters, strict=False)):
            into = x_MC if i in (0, branch) else outputs[-1].relu_()
            z = _forward(into, _cast(w, x_MC), tiles, layer.side, layer.stride)
            y, mean, inverse_std = norm_forward(z, layer.norm, tiles, layer.side // layer.stride)
            outputs.append(y)
            saved += [into, z, mean, inverse_std]
        shortcut = x_MC if branch == len(layers) else outputs[branch]
        out = outputs[branch - 1].add_(shortcut).relu_()
        ctx.save_for_backward(out, *parameters[: 2 * len(layers)], *saved)
        ctx.block = tiles, layers, branch, owns
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_out: Tensor) -> tuple[Any, ...]:
        tiles, layers, branch, owns = ctx.block
        count = len(layers)
        out, *tensors = ctx.saved_tensors
        to_weights: list[Any] = [None] * count
        to_scales, to_shifts = to_weights.copy(), to_weights.copy()

        def back(i: int, g: Tensor, add_to: Tensor | None = None) -> Tensor:
            into, z, mean, inverse_std = tensors[2 * count + 4 * i :][:4]
            layer, scale = layers[i], tensors[count + i]
            g, to_scales[i], to_shifts[i] = norm_backward(g, z, scale, mean, inverse_std, tiles, layer.side // layer.stride)
            g, to_w = _backward(g, into, _cast(tensors[i], into), tiles, layer.side, layer.stride, add_to)
            to_weights[i] = to_w.to(tensors[i].dtype)
            return g

        def through_relu(g: Tensor, y: Tensor) -> Tensor:
            return aten.threshold_backward.grad_input(g, y, 0, grad_input=g)

        g = g_out = through_relu(g_out.contiguous() if owns else g_out.clone(memory_format=torch.contiguous_format), out)
        for i in reversed(range(1, branch)):
            g = through_relu(back(i, g), tensors[2 * count + 4 * i])
        to_x = back(0, g, add_to=g_out if branch == count else None)
        if branch < count:
            to_x = back(branch, g_out, add_to=to_x)
        return to_x, None, None, None, None, *to_weights, *to_scales, *to_shifts


class _PoolFunction(torch.autograd.Function):
    """3x3 max-pool of stride 2 on non-negative tiles: zeros outside or hidden are neutral."""

    @staticmethod
    def forward(ctx: Any, x_MC: Tensor, tiles: TileMap, side: int) -> Tensor:
        window = _read_window(x_MC, tiles, side, 1, 0)[: tiles.count]
        y, chosen = F.max_pool2d(window, 3, 2, return_indices=True)
        ctx.save_for_backward(chosen.to(torch.int16))  # an index into a window
        ctx.where = tiles, side, window.shape
        return _as_rows(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_MC: Tensor) -> tuple[Any, ...]:
        tiles, side, shape = ctx.where
        (chosen,) = ctx.saved_tensors
        g = _as_tiles(g_MC.contiguous(), side // 2)
        window = g.new_empty(shape).contiguous(memory_format=torch.channels_last)  # its shape is read, and not its values
        g = aten.max_pool2d_with_indices_backward(g, window, [3, 3], [2, 2], _NONE, _ONE, False, chosen.long())
        return _fold(g, tiles), None, None


class ResidualBlock(Protocol):
    """A block of models/resnet.py, as tiles need it."""

    @property
    def branch(self) -> list[ConvNorm]:
        """Return the convolutions beside the shortcut and their norms, in order."""

    @property
    def downsample(self) -> nn.Sequential | None:
        """Return the convolution and the norm of the shortcut, or None."""


def _layers(block: ResidualBlock, side: int) -> tuple[list[_Layer], int, int]:
    """Return the layers, the shortcut's last, the length of the branch, and the output's side."""
    layers, start = [], side
    for conv, norm in block.branch:
        layers.append(_Layer(conv, norm, side))
        side //= layers[-1].stride
    branch = len(layers)
    if block.downsample is not None:
        layers.append(_Layer(*block.downsample, start))  # type: ignore[call-arg]
    return layers, branch, side


def _stem(layer: ConvNorm, masked_BCHW: Tensor, tiles: TileMap, dtype: torch.dtype) -> Tensor:
    """Return the first convolution and BatchNorm of the masked image, [M, C], non-negative."""
    conv, norm = layer
    cell = masked_BCHW.shape[-1] // tiles.shape[-1]
    kernel, stride = conv.weight.shape[-1], conv.stride[0]
    before, after = kernel // 2, kernel - kernel // 2 - stride
    # A tile without content reads one more image, of zeros.
    more = 0 if tiles.with_content(1) is None else 1
    padded = F.pad(masked_BCHW.to(dtype), (before, after, before, after, 0, 0, 0, more)).permute(0, 2, 3, 1)
    window = cell + before + after
    image, row, column = coordinates(tiles.cells, tiles.shape)
    windows = padded.unfold(1, window, cell).unfold(2, window, cell)[image, row, column]  # [N, C, W, W]
    weight = conv.weight.to(dtype).contiguous(memory_format=torch.channels_last)
    z_MC = _as_rows(F.conv2d(_padded(windows, tiles).contiguous(memory_format=torch.channels_last), weight, None, stride)[: tiles.count])
    if (count := tiles.with_content(cell // stride)) is None:
        return F.relu_(norm(flat(z_MC)).permute(0, 2, 3, 1).flatten(0, 2))
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked += 1
    return F.relu(counted_norm.apply(z_MC, norm, count, partial(tiles.clear, side=cell // stride)))


def run_blocks(blocks: Sequence[ResidualBlock], x_MC: Tensor, tiles: TileMap, side: int) -> tuple[Tensor, int]:
    """Apply residual blocks in training mode to non-negative rows; return rows and their side."""
    for block in blocks:
        layers, branch, after = _layers(block, side)
        torch._foreach_add_([count for n in layers if (count := n.norm.num_batches_tracked) is not None], 1)
        weights = [layer.conv.weight for layer in layers]
        norms = [n.norm.weight for n in layers] + [n.norm.bias for n in layers]
        # The last block's gradient may have other readers; the others' come from the next block.
        x_MC = _Residual.apply(x_MC, tiles, layers, branch, block is not blocks[-1], *weights, *norms)
        side = after
    return x_MC, side


def computed_in(x: Tensor) -> torch.dtype:
    """Return the dtype in which a convolution of `x` is computed: that of autocast, which leaves float64 alone."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def pass_tiles(
    stem: ConvNorm,
    small: bool,
    stages: Sequence[Sequence[ResidualBlock]],
    masked_BCHW: Tensor,
    tiles: TileMap,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Return the features after each stage, [B, C, h S, w S] with S positions per side of a cell.

    Hidden cells of the images must be zero. All is computed in `dtype`, without autocast.
    """
    with torch.autocast(masked_BCHW.device.type, enabled=False):
        x_MC = _stem(stem, masked_BCHW, tiles, dtype)
        side = masked_BCHW.shape[-1] // tiles.shape[-1] // 2
        if not small:
            x_MC = _PoolFunction.apply(x_MC, tiles, side)
            side //= 2
        found = []
        for blocks in stages:
            # The last block of each run keeps its gradient's memory apart: the next stage and the features both send one.
            x_MC, side = run_blocks(blocks, x_MC, tiles, side)
            found.append(tiles.spread(x_MC, side))
        return found


def encode_tiles(stem: ConvNorm, small: bool, blocks: Sequence[ResidualBlock], image_BCHW: Tensor, visibility: Visibility) -> Tensor:
    """Return masked execution's features [B, C, h, w] of images [B, c, H, W], to rounding.

    They are zero where hidden. A `small` stem has no pooling.
    """
    return encode_stages(stem, small, [blocks], image_BCHW, visibility)[0]


def encode_stages(
    stem: ConvNorm, small: bool, stages: Sequence[Sequence[ResidualBlock]], image_BCHW: Tensor, visibility: Visibility
) -> list[Tensor]:
    """Return the features after each stage, as `pass_tiles` does, of images as they are."""
    masked_BCHW, dtype = image_BCHW * visibility.at(image_BCHW), computed_in(image_BCHW)
    return pass_tiles(stem, small, stages, masked_BCHW, TileMap(visibility), dtype)
