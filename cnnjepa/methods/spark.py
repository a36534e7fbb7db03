"""SparK: reconstruct the hidden cells of an image from features of all stages (Tian et al. 2023, arXiv 2301.03580).

visible, hidden  = masks(seed, step, position)                    random, 0.6 hidden
stages           = encoder(image, visible), after each stage      hidden cells are never seen
dense            = norm(stage) where visible, a token where hidden, projected; for each stage
reconstruction   = decoder(dense)
target           = pixels of a cell - their mean, over their standard deviation
loss             = mean squared difference to the target's pixels, averaged over the hidden cells
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cnnjepa.batch import Batch
from cnnjepa.config import MethodConfig, OptimizerConfig, OptimizerName, TrainConfig, grid_size
from cnnjepa.data.views import ViewSpec
from cnnjepa.mask_config import MaskConfig, MaskStrategy
from cnnjepa.methods._masked import MaskedMethod
from cnnjepa.models.convnext import ConvNeXt
from cnnjepa.models.decoder import Decoder
from cnnjepa.models.masked import Visibility
from cnnjepa.models.resnet import ResNet
from cnnjepa.rules import require_encoder, validate_mask


def _published(beta2: float) -> OptimizerConfig:
    """Return LAMB for a batch of 512: the published rate is 0.0002 x batch / 256."""
    return OptimizerConfig(
        name=OptimizerName.lamb,
        lr=0.0004,
        weight_decay=0.04,
        final_weight_decay_fraction=5.0,
        beta2=beta2,
        warmup_epochs=40.0,
        decay_norms_and_biases=False,
        max_gradient_norm=5.0,
    )


OPTIMIZERS = {"spark": _published(0.95), "spark_convnext": _published(0.999)}
_EPSILON = 1e-6  # added to the variance of a cell's pixels


@dataclass
class Config(MethodConfig):
    """Settings of the method; the defaults are the published ones for a ResNet-50."""

    title: ClassVar[str] = "SparK"
    name: str = "spark"
    mask_ratio: float = 0.6  # share of hidden cells
    decoder_width: int = 512  # channels of its first block; each block halves them
    min_crop_scale: float = 0.67  # smallest share of the image's area

    def validate(self, config: TrainConfig) -> None:
        """Raise ValueError if the encoder is a ViT or a setting breaks its rule."""
        require_encoder(config, vit=False)
        grid = grid_size(config)
        validate_mask(self.mask, "method", grid)
        cell = config.data.image_size // grid
        if self.decoder_width < cell or self.decoder_width % cell:
            rule = f"be a multiple of {cell}, since the decoder's blocks halve it"
            raise ValueError(f"method.decoder_width must {rule}; got {self.decoder_width}")
        if not 0 < self.min_crop_scale <= 1:
            raise ValueError(f"method.min_crop_scale must lie in (0, 1]; got {self.min_crop_scale}")

    @property
    def mask(self) -> MaskConfig:
        """Return the masks: random ones."""
        return MaskConfig(MaskStrategy.random, self.mask_ratio)


def hidden_pixels(image_BCHW: Tensor, visibility: Visibility) -> Tensor:
    """Return the pixels of each hidden cell, [N, C p p] with p pixels per side of a cell."""
    _, h, w = visibility.shape
    cells = image_BCHW.unflatten(3, (w, -1)).unflatten(2, (h, -1)).permute(0, 2, 4, 1, 3, 5)
    return cells.flatten(3).flatten(0, 2).index_select(0, visibility.hidden_cells)


def reconstruction_loss(reconstruction_BCHW: Tensor, image_BCHW: Tensor, visibility: Visibility) -> Tensor:
    """Return the mean squared difference to the normalised pixels, averaged over the hidden cells (section 3.4).

    A cell's pixels, of all channels together, have mean 0 and an unbiased variance of 1.
    """
    pixels = hidden_pixels(image_BCHW, visibility)
    variance, mean = torch.var_mean(pixels, dim=1, keepdim=True)
    target = (pixels - mean) / (variance + _EPSILON).sqrt()
    return (hidden_pixels(reconstruction_BCHW, visibility).to(target.dtype) - target).square().mean()


class Method(MaskedMethod[Config]):
    """Encoder and decoder."""

    encoder: ResNet | ConvNeXt

    def build(self) -> None:
        """Add the decoder."""
        net, config = self.encoder, self.config
        layer_norm = isinstance(net, ConvNeXt)  # features are normalised as in the encoder
        channels = config.data.channels
        self.decoder = Decoder(net.stage_channels, net.cell, self.settings.decoder_width, channels, layer_norm, config.encoder.sync_bn)

    @staticmethod
    def views(config: TrainConfig) -> list[ViewSpec]:
        """Return one view per image: a random crop and a flip."""
        assert isinstance(config.method, Config)
        return [ViewSpec(config.data.image_size, config.method.min_crop_scale, config.data.flip_probability)]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": scalar, "visible_fraction": scalar} of one micro-batch."""
        image, visibility = batch.views[0], self.visibility(batch)
        stages = self.encoder.stage_features(image, visibility)
        batch.show("context", lambda: stages[-1].sum((2, 3)) / visibility.at(stages[-1]).sum((2, 3)).clamp_min(1))
        loss = reconstruction_loss(self.decoder(stages, visibility), image, visibility)
        return {"loss": loss, "visible_fraction": loss.new_full((), visibility.fraction)}
