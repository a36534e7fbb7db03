"""Configuration of masks (paper, section III-B)."""

from dataclasses import dataclass, field
from enum import Enum

from cnnjepa.data_config import ADDED


class MaskStrategy(Enum):
    """Masks (paper, section III-B); mixed draws multi_block or random once per iteration."""

    multi_block = "multi_block"
    random = "random"
    mixed = "mixed"


class MaskBounds(Enum):
    """Blocks of the whole grid, or those that the authors' code draws."""

    grid = "grid"  # scale and aspect are independent; any place of the grid
    official = "official"  # scale and aspect share one number; never the last row and column


@dataclass
class MaskConfig:
    """Which cells of the feature grid the context encoder sees (paper, section III-B)."""

    strategy: MaskStrategy = MaskStrategy.mixed
    mask_ratio: float = 0.6  # random: share of hidden cells
    multi_block_probability: float = 0.75  # mixed: share of iterations that use blocks
    blocks: int = 4  # multi_block: target blocks per sample
    block_scale_min: float = 0.15  # share of the grid's cells
    block_scale_max: float = 0.2
    block_aspect_min: float = 0.75  # height over width
    block_aspect_max: float = 1.5
    bounds: MaskBounds = field(default=MaskBounds.grid, metadata=ADDED)  # multi_block: which blocks are drawn


@dataclass
class BlockMaskConfig:
    """I-JEPA's target blocks, and the larger context block that predicts them."""

    blocks: int = 4  # target blocks per sample
    target_scale_min: float = 0.15  # share of the grid's cells
    target_scale_max: float = 0.2
    target_aspect_min: float = 0.75  # height over width
    target_aspect_max: float = 1.5
    context_scale_min: float = 0.85  # a square block, minus the cells that the targets cover
    context_scale_max: float = 1.0
