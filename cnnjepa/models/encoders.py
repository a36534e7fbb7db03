"""The encoder of a configuration, by its name: images [B, 3, H, W] to features [B, out_channels, h, w].

A family's file is imported when one of its networks is asked for: timm takes seconds, and only ViTs need it.
"""

from typing import TYPE_CHECKING, TypeAlias

import torch

from cnnjepa.config import VITS, EncoderConfig
from cnnjepa.models import resnet
from cnnjepa.models.resnet import ResNet

if TYPE_CHECKING:
    from cnnjepa.models.vit import VisionTransformer

Encoder: TypeAlias = "ResNet | VisionTransformer"


def build_encoder(config: EncoderConfig, image_size: int, generator_seed: int) -> Encoder:
    """A freshly initialised encoder; equal weights for equal `generator_seed`, whatever was drawn before."""
    if config.name not in VITS:
        return resnet.build_encoder(config, generator_seed)
    from cnnjepa.models.vit import build_vit

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_seed)
        return build_vit(config, image_size)
