"""LeJEPA: predict each view's embedding from the global views', and keep embeddings Gaussian (arXiv 2511.08544).

z_v         = head(encoder(view v))                    2 global crops, 6 small local ones; no teacher
centre      = mean of z_v over the global views        with gradient
prediction  = mean over views, images and dimensions of (centre - z_v)^2
SIGReg      = mean over views and directions a of the Epps-Pulley statistic of a'z_v over the global batch
loss        = (1 - lambda) prediction + lambda SIGReg
"""

import itertools
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from cnnjepa.batch import Batch
from cnnjepa.config import VITS, AugmentConfig, MethodConfig, OptimizerConfig, TrainConfig
from cnnjepa.data.views import ViewSpec, augmented
from cnnjepa.distributed import mean_over_ranks, world_size
from cnnjepa.methods._base import BaseMethod
from cnnjepa.models.heads import build_head
from cnnjepa.models.masked import to_device
from cnnjepa.randomness import Stream, generator
from cnnjepa.rules import validate_augment, validate_sizes

# The authors give one rate for all networks, and a decay for each kind.
OPTIMIZERS = {
    "lejepa": OptimizerConfig(lr=5e-4, weight_decay=5e-4),
    "lejepa_vit": OptimizerConfig(lr=5e-4, weight_decay=0.05),
}
_LAST_KNOT = 5.0  # the integral over t goes from minus this to this


@dataclass
class Config(MethodConfig):
    """Settings of the method; the defaults are the authors'."""

    title: ClassVar[str] = "LeJEPA"
    name: str = "lejepa"
    # Of all views; its crop limit is that of the global ones.
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(min_crop_scale=0.3, solarise_probability=0.2))
    global_views: int = 2
    local_views: int = 6
    local_scale_min: float = 0.05  # share of the image's area
    local_scale_max: float = 0.3
    local_size: int = 0  # pixels per side; 0: 7/16 of the image's, 98 of 224; with a ViT the image's
    hidden: int = 2048  # of each of the head's two hidden layers
    projection: int = 128
    sigreg_weight: float = 0.05  # lambda
    directions: int = 1024  # random, different in each step
    knots: int = 17  # at which characteristic functions are compared
    global_batch: ClassVar[bool] = True

    def validate(self, config: TrainConfig) -> None:
        """Raise ValueError if a size, a number of views, a weight or the augmentation breaks its rule."""
        validate_augment(self.augment, "method.augment", config.data.channels)
        validate_sizes(self, "global_views", "hidden", "projection", "directions")
        if not 0 < self.local_scale_min <= self.local_scale_max <= 1:
            scales = f"{self.local_scale_min} and {self.local_scale_max}"
            raise ValueError(f"method.local_scale_min and local_scale_max must satisfy 0 < min <= max <= 1; got {scales}")
        if self.local_views < 0 or self.global_views + self.local_views < 2:
            raise ValueError(f"method.local_views must be at least 0 and give 2 views with the global ones; got {self.local_views}")
        if self.local_size and self.local_size < 8:
            raise ValueError(f"method.local_size must be 0 or at least 8 pixels; got {self.local_size}")
        if config.encoder.name in VITS and self.local_size not in (0, config.data.image_size):
            raise ValueError(f"method.local_size must be 0 or data.image_size with a ViT, whose grid is fixed; got {self.local_size}")
        if not 0 <= self.sigreg_weight <= 1:
            raise ValueError(f"method.sigreg_weight must lie in [0, 1]; got {self.sigreg_weight}")
        if self.knots < 3 or self.knots % 2 == 0:
            raise ValueError(f"method.knots must be odd and at least 3; got {self.knots}")


def draw_directions(seed: int, step: int, dimensions: int, count: int) -> Tensor:
    """Return `count` random unit vectors [dimensions, count], float64, the same on every rank."""
    drawn = torch.from_numpy(generator(seed, Stream.direction, step).standard_normal((dimensions, count)))
    return drawn / drawn.norm(dim=0)


def sigreg_loss(z_VBD: Tensor, directions_DM: Tensor, knots: int) -> Tensor:
    """Return the Epps-Pulley statistic against the standard normal, averaged over views and directions (section 4).

    With e the empirical characteristic function of N projections, the statistic is N times the
    integral of |e(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) over `knots` points of [-5, 5], by the
    trapezoid rule. N counts the images of all ranks. The integrand is even, so half of the points
    are enough.
    """
    half = knots // 2
    t_K = torch.linspace(0, _LAST_KNOT, half + 1, dtype=z_VBD.dtype, device=z_VBD.device)
    normal_K = (-t_K.square() / 2).exp()
    step = _LAST_KNOT / half
    weights_K = torch.full_like(t_K, 2 * step)  # of t and -t; the ends have half the weight of a trapezoid
    weights_K[-1] = step  # at 0 both functions are 1: its weight does not matter
    angles_VBMK = (z_VBD @ directions_DM)[..., None] * t_K
    real_VMK, imaginary_VMK = mean_over_ranks(torch.stack([angles_VBMK.cos().mean(1), angles_VBMK.sin().mean(1)]))
    distance_VMK = (real_VMK - normal_K).square() + imaginary_VMK.square()
    return z_VBD.shape[1] * world_size() * (distance_VMK @ (weights_K * normal_K)).mean()


def prediction_loss(z_VBD: Tensor, global_views: int) -> Tensor:
    """Return the mean squared difference of each view to the mean of the first `global_views` (section 5)."""
    return (z_VBD[:global_views].mean(0) - z_VBD).square().mean()


class Method(BaseMethod[Config]):
    """Encoder and projection head."""

    def build(self) -> None:
        """Add the head."""
        sizes = [self.encoder.out_channels, self.settings.hidden, self.settings.hidden, self.settings.projection]
        self.head = build_head(sizes, self.config.encoder.sync_bn)

    @staticmethod
    def views(config: TrainConfig) -> list[ViewSpec]:
        """Return the global views and, after them, the smaller local ones, all with the same augmentation."""
        method = config.method
        assert isinstance(method, Config)
        large = augmented(config.data, method.augment)
        size = method.local_size or (large.size if config.encoder.name in VITS else max(large.size * 7 // 16, 8))
        local = replace(large, size=size, min_scale=method.local_scale_min, max_scale=method.local_scale_max)
        return [large] * method.global_views + [local] * method.local_views

    def embed(self, batch: Batch) -> Tensor:
        """Return the projections of all views, [V, B, D], in the views' type.

        Views of one size are encoded in one pass, and all views are projected in one: batch
        statistics are those of all of them.
        """
        by_size = [torch.cat(list(views)) for _, views in itertools.groupby(batch.views, key=lambda view: view.shape[-1])]
        pooled = torch.cat([self.encoder(views).mean((2, 3)) for views in by_size])
        batch.show("context", lambda: pooled[: len(batch.views[0])])
        z_VBD: Tensor = self.head(pooled).to(batch.views[0].dtype).unflatten(0, (len(batch.views), -1))
        return z_VBD

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": scalar} of the global batch, and its two parts, unweighted."""
        z, settings = self.embed(batch), self.settings
        directions = draw_directions(self.config.seed, batch.step, settings.projection, settings.directions)
        # A characteristic function differs from a normal's by less than bf16 resolves.
        with torch.autocast(z.device.type, enabled=False):
            prediction = prediction_loss(z, settings.global_views)
            sigreg = sigreg_loss(z, to_device(directions.to(z.dtype), z.device), settings.knots)
            loss = (1 - settings.sigreg_weight) * prediction + settings.sigreg_weight * sigreg
        return {"loss": loss, "prediction": prediction, "sigreg": sigreg}
