"""Vision transformers of timm's blocks, and I-JEPA's predictor (arXiv 2301.08243, appendix A.1).

Shapes: B images, N patches of the image, K of them given, T target blocks of n patches, D features.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cnnjepa.config import EncoderConfig, EncoderName

# Features and attention heads.
SHAPES = {EncoderName.vit_tiny: (192, 3), EncoderName.vit_small: (384, 6), EncoderName.vit_base: (768, 12)}


def sine_positions(grid: int, width: int) -> Tensor:
    """Return fixed sine embeddings [1, grid x grid, width], half for columns, half for rows."""
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = line[:, None].expand(grid, grid, -1), line[None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=2).reshape(1, grid * grid, 4 * quarter).float()


def take_cells(x_BND: Tensor, cells_BK: Tensor) -> Tensor:
    """Return the rows of each sample at its `cells_BK`, [B, K, D]."""
    return x_BND.take_along_dim(cells_BK[:, :, None], dim=1)


def initialise(module: nn.Module, blocks: nn.Sequential) -> None:
    """Initialise linear layers with truncated normals, biases with 0, and scale down block outputs.

    The std is 0.02 for 768 inputs, as in I-JEPA's ViT-B/16. It scales with the inverse square root
    of the inputs, which keeps the size of the outputs; with 0.02 throughout, a ViT-Ti initially
    outputs little but its positions. Output weights of the i-th block, from 1, are divided by
    sqrt(2 i).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=0.02 * (768 / part.weight[0].numel()) ** 0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    with torch.no_grad():
        for i, block in enumerate(blocks, start=1):
            for name in ("attn.proj.weight", "mlp.fc2.weight"):
                block.get_parameter(name).div_((2 * i) ** 0.5)


_norm: Any = partial(nn.LayerNorm, eps=1e-6)  # timm's own default depends on its version


def _blocks(width: int, depth: int, heads: int) -> nn.Sequential:
    return nn.Sequential(*[Block(width, heads, qkv_bias=True, norm_layer=_norm) for _ in range(depth)])


class VisionTransformer(nn.Module):
    """ViT from images [B, channels, S, S] to features [B, out_channels, S/patch, S/patch].

    There is no class token, and positions are fixed. Keys are timm's without `head`.
    """

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, heads: int, channels: int = 3) -> None:
        super().__init__()
        self.patch_size, self.grid, self.out_channels, self.heads = patch_size, image_size // patch_size, width, heads
        self.patch_embed = PatchEmbed(image_size, patch_size, channels, width)
        self.pos_embed = nn.Parameter(sine_positions(self.grid, width), requires_grad=False)
        self.blocks = _blocks(width, depth, heads)
        self.norm = _norm(width)
        initialise(self, self.blocks)

    def tokens(self, image_BCHW: Tensor, cells_BK: Tensor | None = None) -> Tensor:
        """Return features [B, K, D] of the patches `cells_BK`; None selects all N.

        The selected patches attend only to each other, and nothing is computed for the others.
        """
        size, patch = image_BCHW.shape[-1], self.patch_size
        if image_BCHW.shape[-2] != size or size != self.grid * patch:
            raise ValueError(f"an image must have {self.grid * patch} pixels a side; got {tuple(image_BCHW.shape[-2:])}")
        cut = image_BCHW.reshape(-1, image_BCHW.shape[1], self.grid, patch, self.grid, patch)
        x = cut.permute(0, 2, 4, 1, 3, 5).reshape(len(image_BCHW), self.grid**2, -1)
        positions: Tensor = self.pos_embed
        if cells_BK is not None:
            x, positions = take_cells(x, cells_BK), take_cells(positions.expand(len(x), -1, -1), cells_BK)
        projection = self.patch_embed.proj
        x = F.linear(x, projection.weight.flatten(1), projection.bias) + positions
        return self.norm(self.blocks(x))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return the features of all patches as a feature map."""
        return self.tokens(image_BCHW).transpose(1, 2).unflatten(2, (self.grid, self.grid))


class BlockPredictor(nn.Module):
    """Narrow transformer that predicts the features of target blocks from their positions.

    Each target block is predicted separately: its cells see the context and each other.
    """

    def __init__(self, grid: int, features: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sine_positions(grid, width), requires_grad=False)
        self.blocks = _blocks(width, depth, heads)
        self.norm = _norm(width)
        self.project = nn.Linear(width, features)
        initialise(self, self.blocks)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context_BKD: Tensor, context_BK: Tensor, target_BTn: Tensor) -> Tensor:
        """Map context features and the cells of context and targets to predictions [B, T, n, D]."""
        b, t, n = target_BTn.shape
        positions = self.pos_embed.expand(b, -1, -1)
        context = self.embed(context_BKD) + take_cells(positions, context_BK)
        asked = self.mask_token + take_cells(positions, target_BTn.flatten(1)).view(b * t, n, -1)
        x = torch.cat([context.repeat_interleave(t, dim=0), asked], dim=1)
        return self.project(self.norm(self.blocks(x))[:, -n:]).view(b, t, n, -1)


def build_vit(config: EncoderConfig, image_size: int, channels: int = 3) -> VisionTransformer:
    """Return a freshly initialised ViT of the named width."""
    width, heads = SHAPES[config.name]
    return VisionTransformer(image_size, config.patch_size, width, config.vit_depth, heads, channels)
