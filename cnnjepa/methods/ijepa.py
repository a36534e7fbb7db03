"""I-JEPA: predict features of four blocks of an image from the rest (arXiv 2301.08243).

context, targets = blocks(seed, step, position)                        cells of the patch grid
c                = encoder(patches of the context)                     gradient; no other patches
h                = layer norm(target_encoder(image)), at the targets   no gradient; whole image
p                = predictor(c, mask tokens with the targets' positions)
loss             = mean smooth-L1 of p and h
target_encoder   = EMA(encoder), after each optimiser step
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnjepa.batch import Batch
from cnnjepa.config import EmaConfig, MethodConfig, OptimizerConfig, Schedule, TrainConfig, grid_size
from cnnjepa.data.views import ViewSpec
from cnnjepa.mask_config import BlockMaskConfig
from cnnjepa.masking import draw_blocks, require_context
from cnnjepa.methods._base import BaseMethod
from cnnjepa.models.ema import ema_update, target_of
from cnnjepa.models.masked import to_device
from cnnjepa.rules import require_encoder, validate_block_mask, validate_ema, validate_sizes
from cnnjepa.schedules import ema_momentum

if TYPE_CHECKING:
    from cnnjepa.models.vit import VisionTransformer

# For the official 300 epochs of batch 2048.
OPTIMIZERS = {
    "ijepa": OptimizerConfig(
        lr=0.001, weight_decay=0.04, final_weight_decay_fraction=10.0, decay_norms_and_biases=False, warmup_epochs=40.0
    )
}


@dataclass
class Config(MethodConfig):
    """Settings of the method; the defaults are the official code's for a ViT-B."""

    title: ClassVar[str] = "I-JEPA"
    name: str = "ijepa"
    mask: BlockMaskConfig = field(default_factory=BlockMaskConfig)
    predictor_width: int = 384
    predictor_depth: int = 6
    min_crop_scale: float = 0.3  # smallest share of the image's area; there is no flip
    ema: EmaConfig = field(default_factory=lambda: EmaConfig(schedule=Schedule.linear))

    def validate(self, config: TrainConfig) -> None:
        """Raise ValueError if the encoder is no ViT or a setting breaks its rule."""
        require_encoder(config, vit=True)
        validate_block_mask(self.mask, "method.mask", grid_size(config))
        require_context(self.mask, "method.mask", grid_size(config))
        validate_sizes(self, "predictor_width", "predictor_depth")
        if self.predictor_width % 12:
            raise ValueError(f"method.predictor_width must be a multiple of 12, for heads and sine positions; got {self.predictor_width}")
        if not 0 < self.min_crop_scale <= 1:
            raise ValueError(f"method.min_crop_scale must lie in (0, 1]; got {self.min_crop_scale}")
        validate_ema(self.ema, "method.ema")


class Method(BaseMethod[Config]):
    """Context encoder, target encoder and predictor."""

    encoder: "VisionTransformer"

    def build(self) -> None:
        """Add target encoder and predictor."""
        from cnnjepa.models.vit import BlockPredictor

        net, settings = self.encoder, self.settings
        self.target_encoder = target_of(net)
        size = settings.predictor_width, settings.predictor_depth, net.heads
        self.predictor = BlockPredictor(net.grid, net.out_channels, *size)

    @staticmethod
    def views(config: TrainConfig) -> list[ViewSpec]:
        """Return one view per image: a random crop."""
        assert isinstance(config.method, Config)
        return [ViewSpec(config.data.image_size, config.method.min_crop_scale, flip_probability=0.0)]

    @property
    def probe_encoder(self) -> "VisionTransformer":
        """Return the network that is probed and exported: the target encoder."""
        return self.target_encoder

    def cells(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return cells of the context [B, K] and of the targets [B, T, n], on the device."""
        config = self.config
        drawn = draw_blocks(self.settings.mask, self.encoder.grid, config.seed, batch.step, config.global_batch_size, batch.positions)
        context, targets = (to_device(torch.from_numpy(cells), batch.views[0].device) for cells in drawn)
        return context, targets

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": scalar, "visible_fraction": scalar} of one micro-batch."""
        image, dtype = batch.views[0], batch.views[0].dtype
        context_BK, target_BTn = self.cells(batch)
        context_BKD = self.encoder.tokens(image, context_BK)
        batch.show("context", lambda: context_BKD.mean(1))
        prediction = self.predictor(context_BKD, context_BK, target_BTn)
        with torch.no_grad():
            tokens_BND = self.target_encoder.tokens(image).to(dtype)
            batch.show("target", lambda: tokens_BND.mean(1))
            features_BND = F.layer_norm(tokens_BND, tokens_BND.shape[-1:])
            target = features_BND.take_along_dim(target_BTn.flatten(1)[:, :, None], dim=1).view_as(prediction)
        loss = F.smooth_l1_loss(prediction.to(dtype), target)
        return {"loss": loss, "visible_fraction": loss.new_full((), context_BK.shape[1] / self.encoder.grid**2)}

    def after_step(self, step: int) -> dict[str, Any]:
        """Move the target encoder after optimiser step `step`; return values to log."""
        momentum = ema_momentum(self.settings.ema, step, self.total_steps, self.config.optimizer)
        ema_update(self.target_encoder, self.encoder, momentum)
        return {"ema_momentum": momentum}

    @torch.no_grad()
    def sample_images(self, batch: Batch) -> dict[str, Tensor]:
        """Return at most 8 normalised images to log, black outside their context."""
        images, (context, _) = batch.views[0][:8], self.cells(batch)
        visible = images.new_zeros(len(images), self.encoder.grid**2).scatter_(1, context[:8], 1.0).unflatten(1, (self.encoder.grid, -1))
        patch = self.encoder.patch_size
        return {"context": images * visible.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]}
