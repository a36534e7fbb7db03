"""Supervised training, the upper yardstick: what the same encoder, views and budget come to when labels are given.

It sees the labels of the probes' training images alone: those that choices are made on, and the test images, stay held out.

loss = cross-entropy(linear(pooled encoder(view)), label)
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnjepa.batch import Batch
from cnnjepa.config import DatasetName, MethodConfig, OptimizerConfig, TrainConfig
from cnnjepa.data.views import ViewSpec, crop_and_flip
from cnnjepa.models.encoders import Encoder, build_encoder
from cnnjepa.randomness import Stream, integer

# Our choice: the paper has no supervised row.
OPTIMIZERS = {"supervised": OptimizerConfig(lr=0.001, weight_decay=0.05, decay_norms_and_biases=False)}
_CLASSES = {DatasetName.digits: 10, DatasetName.fashion_mnist: 10, DatasetName.imagenet100: 100, DatasetName.imagenet1k: 1000}


@dataclass
class Config(MethodConfig):
    """The method's own settings."""

    title: ClassVar[str] = "supervised"
    name: str = "supervised"
    classes: int = 0  # 0 takes the number of the data set, where that has a fixed one

    def validate(self, config: TrainConfig) -> None:
        """Raise ValueError unless the number of classes is known, and the data set's own."""
        known = _CLASSES.get(config.data.name)
        if known is None and self.classes < 2:
            raise ValueError(f"method.classes must be given, at least 2, with data={config.data.name.name}; got {self.classes}")
        if known is not None and self.classes not in (0, known):
            raise ValueError(f"method.classes must be 0 or {known} with data={config.data.name.name}; got {self.classes}")


class Method(nn.Module):
    """The trainable whole: encoder and classifier."""

    def __init__(self, config: TrainConfig, total_steps: int) -> None:
        super().__init__()
        assert isinstance(config.method, Config)
        self.encoder = build_encoder(config.encoder, config.data.image_size, integer(config.seed, Stream.weights, 0))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(integer(config.seed, Stream.weights, 1))
            self.classifier = nn.Linear(self.encoder.out_channels, config.method.classes or _CLASSES[config.data.name])

    @staticmethod
    def views(config: TrainConfig) -> list[ViewSpec]:
        """One view an image, CNN-JEPA's."""
        return [crop_and_flip(config.data)]

    @property
    def probe_encoder(self) -> Encoder:
        """The network that is probed and exported."""
        return self.encoder

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss": scalar} of one micro-batch: over its labelled images, divided by all, so that any split over ranks adds up alike."""
        assert batch.labels is not None
        scores = self.classifier(batch.showing("context", self.encoder(batch.views[0]).mean((2, 3)))).to(batch.views[0].dtype)
        return {"loss": F.cross_entropy(scores, batch.labels, ignore_index=-1, reduction="sum") / len(scores)}

    def after_step(self, step: int) -> dict[str, Any]:
        """Nothing follows a step."""
        return {}

    def sample_images(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures for the log: the views."""
        return batch.pictures()
