"""No training, the lower baseline: the initial encoder with calibrated BatchNorm statistics.

Images are loaded once, after the first step, for these statistics. Steps count, but cost nothing.
With `encoder.weights` it is the baseline of those weights, which bring their own statistics.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cnnjepa.batch import Batch
from cnnjepa.config import MethodConfig, TrainConfig
from cnnjepa.data.views import ViewSpec
from cnnjepa.methods._base import BaseMethod
from cnnjepa.probes.features import calibrate_batchnorm
from cnnjepa.run.ranks import joined


@dataclass
class Config(MethodConfig):
    """Settings of the method: none."""

    title: ClassVar[str] = "random"
    name: str = "random"


class Method(BaseMethod[Config]):
    """A frozen encoder, and a parameter for the optimiser, which stays 0."""

    def __init__(self, config: TrainConfig, total_steps: int) -> None:
        # Every rank sees all images of the calibration: there is nothing to synchronise.
        alone = replace(config.encoder, sync_bn=False)
        super().__init__(replace(config, encoder=alone), total_steps)

    def build(self) -> None:
        """Freeze the encoder and add the optimiser's parameter."""
        self.encoder.requires_grad_(False)
        self.unused = nn.Parameter(torch.zeros(1))

    @staticmethod
    def views(config: TrainConfig) -> list[ViewSpec]:
        """Return no views: no image is decoded."""
        return []

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": 0}."""
        return {"loss": 0 * self.unused.sum()}

    def after_step(self, step: int) -> dict[str, Any]:
        """Set the BatchNorm statistics after the first step, the same on every rank."""
        if step == 0 and not self.config.encoder.weights:
            with joined(self.config.device) as ranks:  # the run's own, to end alike if an image cannot be read
                calibrate_batchnorm(self.encoder, self.config, self.splits, ranks)
        return {}
