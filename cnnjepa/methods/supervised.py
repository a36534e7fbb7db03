"""Supervised training, the upper baseline: the same encoder, views and budget, with labels.

It sees only the labels of the probes' training images; held-out and test images stay held out.

loss = cross-entropy(linear(pooled encoder(view)), label)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from cnnjepa.batch import Batch
from cnnjepa.config import MethodConfig, OptimizerConfig, TrainConfig
from cnnjepa.data.views import ViewSpec, crop_and_flip
from cnnjepa.data_config import DatasetName
from cnnjepa.methods._base import BaseMethod

# Our choice: the paper has no supervised row.
OPTIMIZERS = {"supervised": OptimizerConfig(lr=0.001, weight_decay=0.05, decay_norms_and_biases=False)}
_CLASSES = {
    DatasetName.digits: 10,
    DatasetName.fashion_mnist: 10,
    DatasetName.imagenet100: 100,
    DatasetName.imagenet100_kaggle: 100,
    DatasetName.imagenet1k: 1000,
}


@dataclass
class Config(MethodConfig):
    """Settings of the method."""

    title: ClassVar[str] = "supervised"
    name: str = "supervised"
    classes: int = 0  # 0: the data set's own number, if it is fixed

    def validate(self, config: TrainConfig) -> None:
        """Raise ValueError unless the number of classes is known, and the data set's own."""
        known = _CLASSES.get(config.data.name)
        if config.data.name is DatasetName.images:
            raise ValueError("method must be one that needs no labels with data=images; got supervised")
        if known is None and self.classes < 2:
            raise ValueError(f"method.classes must be given, at least 2, with data={config.data.name.name}; got {self.classes}")
        if known is not None and self.classes not in (0, known):
            raise ValueError(f"method.classes must be 0 or {known} with data={config.data.name.name}; got {self.classes}")


class Method(BaseMethod[Config]):
    """Encoder and classifier."""

    def build(self) -> None:
        """Add the classifier."""
        classes = self.settings.classes or _CLASSES[self.config.data.name]
        self.classifier = nn.Linear(self.encoder.out_channels, classes)

    @staticmethod
    def views(config: TrainConfig) -> list[ViewSpec]:
        """Return one view per image, CNN-JEPA's."""
        return [crop_and_flip(config.data)]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": scalar} of one micro-batch, summed over its labelled images.

        The sum is divided by the number of all images, so that any split over ranks adds up alike.
        """
        assert batch.labels is not None
        scores = self.classifier(batch.showing("context", self.encoder(batch.views[0]).mean((2, 3)))).to(batch.views[0].dtype)
        return {"loss": F.cross_entropy(scores, batch.labels, ignore_index=-1, reduction="sum") / len(scores)}
