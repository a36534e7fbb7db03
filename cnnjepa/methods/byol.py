"""BYOL: predict a moving average's embedding of the other view (Grill et al., arXiv 2006.07733).

p1, p2   = predictor(projector(encoder(view 1))), the same of view 2
t1, t2   = target_projector(target_encoder(view 1)), same of view 2   no gradient; batch statistics
loss     = - (cos(p1, t2) + cos(p2, t1)) / 2, averaged over the batch
target   = EMA(encoder, projector), after each optimiser step
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnjepa.batch import Batch
from cnnjepa.config import AugmentConfig, EmaConfig, MethodConfig, OptimizerConfig, OptimizerName, TrainConfig
from cnnjepa.data.views import ViewSpec, augmented
from cnnjepa.methods._base import BaseMethod
from cnnjepa.models.ema import ema_update, target_of
from cnnjepa.models.heads import build_head
from cnnjepa.rules import validate_augment, validate_ema, validate_sizes
from cnnjepa.schedules import ema_momentum

OPTIMIZERS = {
    "byol": OptimizerConfig(lr=0.01, weight_decay=0.01),  # ImageNet-100
    # ImageNet-1k; the heads are wider there: method.hidden=4096.
    "byol_imagenet1k": OptimizerConfig(name=OptimizerName.lars, lr=0.45, weight_decay=1e-6, decay_norms_and_biases=False),
}


@dataclass
class Config(MethodConfig):
    """Settings of the method; the defaults are the CNN-JEPA paper's for ImageNet-100."""

    title: ClassVar[str] = "BYOL"
    name: str = "byol"
    view1: AugmentConfig = field(default_factory=lambda: AugmentConfig(blur_probability=1.0))
    view2: AugmentConfig = field(default_factory=lambda: AugmentConfig(blur_probability=0.1, solarise_probability=0.2))
    hidden: int = 1024  # of projector and predictor
    projection: int = 256
    ema: EmaConfig = field(default_factory=EmaConfig)

    def validate(self, config: TrainConfig) -> None:
        """Raise ValueError if a size, a momentum or an augmentation breaks its rule."""
        validate_augment(self.view1, "method.view1", config.data.channels)
        validate_augment(self.view2, "method.view2", config.data.channels)
        validate_sizes(self, "hidden", "projection")
        validate_ema(self.ema, "method.ema")


def cosine_loss(p1_BD: Tensor, t2_BD: Tensor, p2_BD: Tensor, t1_BD: Tensor) -> Tensor:
    """Return the negative cosine, averaged over both directions.

    This is half the paper's squared distance, less 1.
    """
    return -(F.cosine_similarity(p1_BD, t2_BD).mean() + F.cosine_similarity(p2_BD, t1_BD).mean()) / 2


class Method(BaseMethod[Config]):
    """Encoder, projector and predictor, and the target's encoder and projector."""

    def build(self) -> None:
        """Add projector, predictor and targets."""
        hidden, projection = self.settings.hidden, self.settings.projection
        sync = self.config.encoder.sync_bn
        self.projector = build_head([self.encoder.out_channels, hidden, projection], sync)
        self.predictor = build_head([projection, hidden, projection], sync)
        self.target_encoder, self.target_projector = target_of(self.encoder), target_of(self.projector)

    @staticmethod
    def views(config: TrainConfig) -> list[ViewSpec]:
        """Return two views per image, drawn differently."""
        assert isinstance(config.method, Config)
        return [augmented(config.data, config.method.view1), augmented(config.data, config.method.view2)]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": scalar} of one micro-batch."""
        dtype = batch.views[0].dtype
        p1, p2 = (
            self.predictor(self.projector(batch.showing("context", self.encoder(view).mean((2, 3))))).to(dtype) for view in batch.views
        )
        with torch.no_grad():
            t1, t2 = (
                self.target_projector(batch.showing("target", self.target_encoder(view).mean((2, 3)))).to(dtype) for view in batch.views
            )
        return {"loss": cosine_loss(p1, t2, p2, t1)}

    def after_step(self, step: int) -> dict[str, Any]:
        """Move the target after optimiser step `step`; return values to log."""
        momentum = ema_momentum(self.settings.ema, step, self.total_steps, self.config.optimizer)
        ema_update(self.target_encoder, self.encoder, momentum)
        ema_update(self.target_projector, self.projector, momentum)
        return {"ema_momentum": momentum}
