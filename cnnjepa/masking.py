"""Draw masks for square grids from 3x3: multi-block, random and mixed (paper, section III-B).

A mask depends only on (seed, step, position in the global batch), whatever the number of ranks.
Known differences from the authors' code: scale and aspect are independent draws, where theirs share
one number, and the last row and column can be targets, unless `bounds` is official; every rank
draws its own samples' masks.
"""

from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cnnjepa.mask_config import BlockMaskConfig, MaskBounds, MaskConfig, MaskStrategy
from cnnjepa.randomness import Stream, generator


def visible_cells(mask_ratio: float, cells: int) -> int:
    """Return how many cells a random mask leaves visible: round(cells x (1 - ratio)).

    The result is at least one and less than all cells.
    """
    return min(max(round(cells * (1 - mask_ratio)), 1), cells - 1)


def block_shape(scale: float, aspect: float, grid: int) -> tuple[int, int]:
    """Return height and width, in cells and less than `grid`, of a block of `scale` x its area."""
    area = max(int(scale * grid * grid), 1)
    height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    return min(max(height, 1), grid - 1), min(max(width, 1), grid - 1)


def draw_visible(config: MaskConfig, grid: int, seed: int, step: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Return masks [len(positions), grid, grid], True for cells that the context encoder sees.

    Each mask has at least one visible and one hidden cell.
    """
    random = generator(seed, Stream.mask, step)
    # Draw for the whole iteration first, then a row of numbers per position: row p is the same for
    # every batch size.
    use_blocks, scale, aspect = random.random(3)
    blocks = config.strategy is MaskStrategy.multi_block or (
        config.strategy is MaskStrategy.mixed and use_blocks < config.multi_block_probability
    )
    rows = int(positions.max()) + 1
    if not blocks:
        noise = random.random((rows, grid * grid))[positions]
        count = visible_cells(config.mask_ratio, grid * grid)
        visible = np.zeros(noise.shape, dtype=np.bool_)
        np.put_along_axis(visible, np.argpartition(noise, count - 1, axis=1)[:, :count], True, axis=1)
        return visible.reshape(-1, grid, grid)
    official = config.bounds is MaskBounds.official
    height, width = block_shape(
        _between(config.block_scale_min, config.block_scale_max, scale),
        _between(config.block_aspect_min, config.block_aspect_max, scale if official else aspect),
        grid,
    )
    places = [grid - height + (not official), grid - width + (not official)]
    corners = random.random((rows, config.blocks, 2))[positions] * places
    hidden_by_block = _covered(corners.astype(np.int64), height, width, grid)
    # Add blocks in order, but none that would hide the last visible cell (small grids only).
    hidden = np.logical_or.accumulate(hidden_by_block, axis=1)
    keeps_some = ~hidden.all(axis=(2, 3))
    last = keeps_some.sum(axis=1) - 1
    return ~hidden[np.arange(len(hidden)), last]


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def _covered(corners: npt.NDArray[np.int64], height: int, width: int, grid: int) -> npt.NDArray[np.bool_]:
    """Return [..., grid, grid], True within the block at top left `corners` [..., 2]."""
    top, left = corners[..., :1], corners[..., 1:]
    line = np.arange(grid)
    in_rows, in_columns = (line >= top) & (line < top + height), (line >= left) & (line < left + width)
    return in_rows[..., :, None] & in_columns[..., None, :]


def require_context(config: BlockMaskConfig, key: str, grid: int) -> None:
    """Raise ValueError unless an eighth of the grid remains as context beside any target."""
    side, _ = block_shape(config.context_scale_min, 1.0, grid)
    aspects = np.linspace(config.target_aspect_min, config.target_aspect_max, 64)
    largest = max(height * width for height, width in (block_shape(config.target_scale_max, a, grid) for a in aspects))
    left = side * side - largest
    if left < max(grid * grid // 8, 1):
        rule = f"leave {max(grid * grid // 8, 1)} of the {grid}x{grid} cells as context beside a target of {key}.target_scale_max"
        raise ValueError(f"{key}.context_scale_min must {rule}; got {config.context_scale_min:g}, which leaves {max(left, 0)}")


@dataclass(frozen=True)
class _BatchBlocks:
    """Blocks of a whole global batch."""

    height: int  # of a target, in cells
    width: int
    corners: npt.NDArray[np.int64]  # of the targets [global batch, blocks, 2]
    context: npt.NDArray[np.bool_]  # [global batch, cells], True where the context may be
    kept: int  # cells of every context
    noise: npt.NDArray[np.float64]  # [global batch, cells], decides which cells are left out


@lru_cache(maxsize=1)  # all micro-batches of a step make the same call
def _batch_blocks(values: tuple[Any, ...], grid: int, seed: int, step: int, global_batch: int) -> _BatchBlocks:
    """Return the blocks of one step; `values` are those of a BlockMaskConfig."""
    config = BlockMaskConfig(*values)
    random = generator(seed, Stream.mask, step)
    target_scale, target_aspect, context_scale = random.random(3)
    height, width = block_shape(
        _between(config.target_scale_min, config.target_scale_max, target_scale),
        _between(config.target_aspect_min, config.target_aspect_max, target_aspect),
        grid,
    )
    side, _ = block_shape(_between(config.context_scale_min, config.context_scale_max, context_scale), 1.0, grid)
    places = random.random((global_batch, config.blocks + 1, 2))
    noise = random.random((global_batch, grid * grid))
    context = _covered((places[:, -1] * (grid - side + 1)).astype(np.int64), side, side, grid)
    corners = (places[:, :-1] * [grid - height + 1, grid - width + 1]).astype(np.int64)
    for block in range(config.blocks):
        left_over = context & ~_covered(corners[:, block], height, width, grid)
        crowded = left_over.sum(axis=(1, 2)) < max(grid * grid // 8, 1)
        if block:
            corners[crowded, block] = corners[crowded, 0]
            left_over[crowded] = context[crowded]
        context = left_over
    context = context.reshape(global_batch, -1)
    return _BatchBlocks(height, width, corners, context, int(context.sum(axis=1).min()), noise)


def draw_blocks(
    config: BlockMaskConfig, grid: int, seed: int, step: int, global_batch: int, positions: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return I-JEPA's context [B, K] and targets [B, blocks, n] as cell indices in row order.

    `positions` selects the samples of the global batch. Block sizes are drawn once per iteration,
    places once per sample (Assran et al. 2023, section 3). The context is a block minus all
    targets. K is the smallest context of the global batch, so that the number of ranks changes
    nothing; larger contexts lose random cells. A target that would leave less than an eighth of the
    grid as context is replaced by the sample's first target, which always fits (see
    `require_context`).
    """
    drawn = _batch_blocks(astuple(config), grid, seed, step, global_batch)
    order = np.where(drawn.context[positions], drawn.noise[positions], 2.0)
    context_cells = np.sort(np.argpartition(order, drawn.kept - 1, axis=1)[:, : drawn.kept], axis=1)
    block_cells = (np.arange(drawn.height)[:, None] * grid + np.arange(drawn.width)).reshape(-1)
    corners = drawn.corners[positions]
    target_cells = (corners[:, :, 0] * grid + corners[:, :, 1])[:, :, None] + block_cells
    return context_cells, target_cells
