"""SimCLR: find the other view of each image in the batch (Chen et al. 2020, arXiv 2002.05709).

z1, z2   = head(encoder(view 1)), head(encoder(view 2))        one projection per view
gather   = z1 and z2 of all ranks
loss     = cross-entropy of each projection's partner among 2N - 1 others, by cosine / temperature
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnjepa.batch import Batch
from cnnjepa.config import AugmentConfig, MethodConfig, OptimizerConfig, OptimizerName, TrainConfig
from cnnjepa.data.views import ViewSpec, augmented
from cnnjepa.distributed import gather_batch
from cnnjepa.methods._base import BaseMethod
from cnnjepa.models.heads import build_head
from cnnjepa.rules import validate_augment, validate_sizes

# The same for ImageNet-100 and ImageNet-1k.
OPTIMIZERS = {"simclr": OptimizerConfig(name=OptimizerName.lars, lr=1.7, weight_decay=1e-6, decay_norms_and_biases=False)}


@dataclass
class Config(MethodConfig):
    """Settings of the method; the defaults are those of the CNN-JEPA paper's comparison."""

    title: ClassVar[str] = "SimCLR"
    name: str = "simclr"
    # Of both views.
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2))
    hidden: int = 2048
    projection: int = 128
    temperature: float = 0.1
    global_batch: ClassVar[bool] = True

    def validate(self, config: TrainConfig) -> None:
        """Raise ValueError if a size, the temperature or the augmentation breaks its rule."""
        validate_augment(self.augment, "method.augment", config.data.channels)
        validate_sizes(self, "hidden", "projection")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"method.temperature must be positive and finite; got {self.temperature}")


def nt_xent_loss(z1_ND: Tensor, z2_ND: Tensor, temperature: float) -> Tensor:
    """Return the mean cross-entropy of finding the partner of each of 2N projections (eq. 1)."""
    z = F.normalize(torch.cat([z1_ND, z2_ND]), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z1_ND))
    return F.cross_entropy(similarity, partner)


class Method(BaseMethod[Config]):
    """Encoder and projection head."""

    def build(self) -> None:
        """Add the head."""
        sizes = [self.encoder.out_channels, self.settings.hidden, self.settings.projection]
        self.head = build_head(sizes, self.config.encoder.sync_bn, last_norm=True)

    @staticmethod
    def views(config: TrainConfig) -> list[ViewSpec]:
        """Return two views per image, drawn alike."""
        assert isinstance(config.method, Config)
        return [augmented(config.data, config.method.augment)] * 2

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": scalar} of the global batch; this micro-batch is the rank's share."""
        z1, z2 = (self.head(batch.showing("context", self.encoder(view).mean((2, 3)))) for view in batch.views)
        # Similarities over a temperature of 0.1 are too coarse in bf16.
        with torch.autocast(z1.device.type, enabled=False):
            dtype = batch.views[0].dtype
            loss = nt_xent_loss(gather_batch(z1.to(dtype)), gather_batch(z2.to(dtype)), self.settings.temperature)
        return {"loss": loss}
