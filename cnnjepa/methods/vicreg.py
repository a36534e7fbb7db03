"""VICReg: embed two views alike, with varied, uncorrelated dimensions (arXiv 2105.04906).

z1, z2      = head(encoder(view 1)), head(encoder(view 2))
invariance  = mean squared difference of z1 and z2
variance    = mean over dimensions of max(0, 1 - std over the global batch), of both views
covariance  = sum of squared off-diagonal covariances over the global batch / D, of both views
loss        = 25 invariance + 25 variance + 1 covariance
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
OPTIMIZERS = {"vicreg": OptimizerConfig(name=OptimizerName.lars, lr=0.5, weight_decay=1e-6, decay_norms_and_biases=False)}
_EPSILON = 1e-4  # under the root of the variance


@dataclass
class Config(MethodConfig):
    """Settings of the method; the defaults are those of the CNN-JEPA paper's comparison."""

    title: ClassVar[str] = "VICReg"
    name: str = "vicreg"
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(solarise_probability=0.1))  # of both views
    width: int = 8192  # of each of the head's layers
    depth: int = 3
    invariance: float = 25.0
    variance: float = 25.0
    covariance: float = 1.0
    global_batch: ClassVar[bool] = True

    def validate(self, config: TrainConfig) -> None:
        """Raise ValueError if a size, a weight or the augmentation breaks its rule."""
        validate_augment(self.augment, "method.augment", config.data.channels)
        validate_sizes(self, "width", "depth")
        for name in ("invariance", "variance", "covariance"):
            weight = getattr(self, name)
            if not 0 <= weight < float("inf"):
                raise ValueError(f"method.{name} must be at least 0 and finite; got {weight}")


def variance_loss(z_ND: Tensor) -> Tensor:
    """Return by how much the dimensions' standard deviations fall short of 1 (equation 1)."""
    return F.relu(1 - (z_ND.var(dim=0) + _EPSILON).sqrt()).mean()


def covariance_loss(z_ND: Tensor) -> Tensor:
    """Return the squared covariances of different dimensions, summed, over D (equation 4).

    The squared entries of Z'Z and of ZZ' have the same sum, but ZZ' is N x N, not D x D: for 512
    images of 8192 dimensions a sixteenth of the work, and 1 MB instead of 268.
    """
    count, dimensions = z_ND.shape
    centred = z_ND - z_ND.mean(dim=0)
    of_all = (centred @ centred.T).square().sum()
    of_the_diagonal = centred.square().sum(dim=0).square().sum()
    return (of_all - of_the_diagonal) / (count - 1) ** 2 / dimensions


class Method(BaseMethod[Config]):
    """Encoder and expander head."""

    def build(self) -> None:
        """Add the head."""
        sizes = [self.encoder.out_channels] + [self.settings.width] * self.settings.depth
        self.head = build_head(sizes, self.config.encoder.sync_bn)

    @staticmethod
    def views(config: TrainConfig) -> list[ViewSpec]:
        """Return two views per image, drawn alike."""
        assert isinstance(config.method, Config)
        return [augmented(config.data, config.method.augment)] * 2

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": scalar} of the global batch, and its three parts, unweighted."""
        z1, z2 = (self.head(batch.showing("context", self.encoder(view).mean((2, 3)))) for view in batch.views)
        # Sums of squares over thousands of dimensions would not survive bf16.
        with torch.autocast(z1.device.type, enabled=False):
            z1, z2 = (gather_batch(z.to(batch.views[0].dtype)) for z in (z1, z2))
            invariance = F.mse_loss(z1, z2)
            variance = (variance_loss(z1) + variance_loss(z2)) / 2
            covariance = covariance_loss(z1) + covariance_loss(z2)
            s = self.settings
            loss = s.invariance * invariance + s.variance * variance + s.covariance * covariance
        return {"loss": loss, "invariance": invariance, "variance": variance, "covariance": covariance}
