"""The encoder of a configuration, by its name: images [B, 3, H, W] to features [B, out_channels, h, w].

A family's file is imported when one of its networks is asked for.
"""

from cnnjepa.config import EncoderConfig
from cnnjepa.models import resnet
from cnnjepa.models.resnet import ResNet

Encoder = ResNet


def build_encoder(config: EncoderConfig, generator_seed: int) -> Encoder:
    """A freshly initialised encoder; equal weights for equal `generator_seed`, whatever was drawn before."""
    return resnet.build_encoder(config, generator_seed)
