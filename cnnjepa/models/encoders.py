"""Build the encoder of a configuration: images [B, C, H, W] to features [B, out_channels, h, w].

The ViTs' file is imported only when needed, because importing timm takes seconds.
"""

from typing import TYPE_CHECKING, TypeAlias

import torch

from cnnjepa.config import VITS, EncoderConfig
from cnnjepa.models import convnext, resnet
from cnnjepa.models.convnext import ConvNeXt
from cnnjepa.models.resnet import ResNet

if TYPE_CHECKING:
    from cnnjepa.models.vit import VisionTransformer

Encoder: TypeAlias = "ResNet | ConvNeXt | VisionTransformer"


def build_encoder(config: EncoderConfig, image_size: int, generator_seed: int, channels: int = 3) -> Encoder:
    """Return a new encoder of images with so many channels. Its weights depend only on `generator_seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_seed)
        if config.name in VITS:
            from cnnjepa.models.vit import build_vit

            return build_vit(config, image_size, channels)
        if config.name in convnext.SHAPES:
            return convnext.build_convnext(config, channels)
        return resnet.build_encoder(config, generator_seed, channels)
