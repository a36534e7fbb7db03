"""CNN-JEPA: predict features of hidden cells from the visible ones (arXiv 2408.07514, section III).

visible, hidden      = masks(seed, step, position)
context              = encoder(image, visible)           gradient; hidden cells are never seen
context[hidden]      = mask token
prediction           = predictor(context)
target               = target_encoder(image)             no gradient; whole image; batch statistics
loss                 = mean over hidden cells of 1 - cos(prediction, target)
target_encoder       = EMA(encoder), after each optimiser step; or the first encoder throughout
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnjepa.batch import Batch
from cnnjepa.config import EmaConfig, MethodConfig, PredictorConfig, PredictorConv, TrainConfig, grid_size
from cnnjepa.data.views import ViewSpec, crop_and_flip
from cnnjepa.data_config import ADDED
from cnnjepa.mask_config import MaskConfig
from cnnjepa.methods._masked import MaskedMethod
from cnnjepa.models.compiled import Compiled
from cnnjepa.models.ema import ema_update, target_of
from cnnjepa.models.encoders import Encoder
from cnnjepa.models.graphs import Graphed
from cnnjepa.models.masked import Visibility
from cnnjepa.models.predictor import build_predictor
from cnnjepa.models.resnet import ResNet
from cnnjepa.models.tile_graphs import TileGraphs
from cnnjepa.rules import require_encoder, validate_ema, validate_mask
from cnnjepa.schedules import ema_momentum


class Teacher(Enum):
    """What the target encoder is: an EMA of the encoder, or frozen as the encoder was at the start."""

    ema = "ema"
    frozen = "frozen"


@dataclass
class Config(MethodConfig):
    """Settings of the method; the defaults are the paper's."""

    title: ClassVar[str] = "CNN-JEPA"
    name: str = "cnn_jepa"
    mask: MaskConfig = field(default_factory=MaskConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    teacher: Teacher = field(default=Teacher.ema, metadata=ADDED)  # frozen: `ema` has no effect

    def validate(self, config: TrainConfig) -> None:
        """Raise ValueError if mask, predictor or EMA settings break their rules."""
        require_encoder(config, vit=False)
        validate_mask(self.mask, "method.mask", grid_size(config))
        predictor = self.predictor
        if not 1 <= predictor.depth <= 6:
            raise ValueError(f"method.predictor.depth must lie in [1, 6]; got {predictor.depth}")
        if predictor.kernel not in (3, 5, 7, 9):
            raise ValueError(f"method.predictor.kernel must be 3, 5, 7 or 9; got {predictor.kernel}")
        if predictor.conv is PredictorConv.pointwise and predictor.kernel != PredictorConfig.kernel:
            raise ValueError(f"method.predictor.kernel must keep its default with conv=pointwise; got {predictor.kernel}")
        if not 0 < predictor.width <= 8:
            raise ValueError(f"method.predictor.width must lie in (0, 8]; got {predictor.width}")
        validate_ema(self.ema, "method.ema")
        for key, value in vars(self.ema).items() if self.teacher is Teacher.frozen else ():
            if value != getattr(EmaConfig, key):
                rule = "keep its default with method.teacher=frozen, whose target never moves"
                raise ValueError(f"method.ema.{key} must {rule}; got {getattr(value, 'name', value)}")


def masked_prediction_loss(prediction_BChw: Tensor, target_BChw: Tensor, visibility: Visibility) -> Tensor:
    """Return smooth L1 of unit features, summed over channels, averaged over the hidden cells.

    Unit vectors without negative parts differ by at most 1, so this equals 1 - cos (equation 1).
    """

    def unit(features_BChw: Tensor) -> Tensor:
        features = features_BChw.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, visibility.hidden_cells)
        return F.normalize(features.to(features.dtype if features.dtype is torch.float64 else torch.float32), dim=-1)

    prediction, target = unit(prediction_BChw), unit(target_BChw)
    return F.smooth_l1_loss(prediction, target, reduction="none").sum(-1).mean()


def visible_mean(features_BChw: Tensor, visibility: Visibility) -> Tensor:
    """Return the mean over each image's visible cells, [B, C]."""
    shown = visibility.at(features_BChw)
    return (features_BChw * shown).sum((2, 3)) / shown.sum((2, 3)).clamp_min(1)


class Method(MaskedMethod[Config]):
    """Context encoder, target encoder, mask token and predictor."""

    def build(self) -> None:
        """Add target encoder, predictor and mask token."""
        self.target_encoder = target_of(self.encoder)
        channels, encoder = self.encoder.out_channels, self.config.encoder
        self.predictor = build_predictor(self.settings.predictor, channels, encoder.sync_bn)
        token = torch.empty(1, channels, 1, 1)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(token, std=0.02, a=-0.02, b=0.02))
        # Not the modules: as attributes of another they would be registered twice.
        self.run_target: Callable[[Tensor], Tensor] = self.target_encoder.__call__
        self.run_predictor: Callable[[Tensor], Tensor] = self.predictor.__call__
        if encoder.compile:
            self.run_target, self.run_predictor = Compiled(self.target_encoder), Compiled(self.predictor)
        if encoder.graphs:
            self.run_target = Graphed(self.target_encoder)
            if isinstance(self.encoder, ResNet):
                self.encoder.tile_graphs = TileGraphs(self.encoder)

    @staticmethod
    def views(config: TrainConfig) -> list[ViewSpec]:
        """Return one view per image: a random crop and a flip (paper, section IV-A)."""
        return [crop_and_flip(config.data)]

    @property
    def probe_encoder(self) -> Encoder:
        """Return the network that is probed and exported: the target encoder, or the encoder if the target is frozen."""
        if self.settings.teacher is Teacher.frozen:
            return self.encoder
        return self.target_encoder

    def predict(self, image_BCHW: Tensor, visibility: Visibility) -> dict[str, Tensor]:
        """Return context features, prediction and target features, each [B, C, h, w]."""
        # No gradient, but batch statistics: the target encoder stays in training mode, and its
        # running statistics move. It goes first, so that its temporary memory does not add to what
        # the context encoder keeps.
        with torch.inference_mode():
            target = self.run_target(image_BCHW)
        context = self.encoder(image_BCHW, visibility)
        filled = torch.where(visibility.visible_Bhw[:, None], context, self.mask_token.to(context.dtype))
        return {"context": context, "prediction": self.run_predictor(filled), "target": target}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": scalar, "visible_fraction": scalar} of one micro-batch."""
        visibility = self.visibility(batch)
        out = self.predict(batch.views[0], visibility)
        context, target = out["context"], out["target"]
        batch.show("context", lambda: visible_mean(context, visibility))
        batch.show("target", lambda: target.mean((2, 3)))
        loss = masked_prediction_loss(out["prediction"], out["target"], visibility)
        return {"loss": loss, "visible_fraction": loss.new_full((), visibility.fraction)}

    def after_step(self, step: int) -> dict[str, Any]:
        """Move the target encoder after optimiser step `step`, unless it is frozen; return values to log."""
        if self.settings.teacher is Teacher.frozen:
            return {}
        momentum = ema_momentum(self.settings.ema, step, self.total_steps, self.config.optimizer)
        ema_update(self.target_encoder, self.encoder, momentum)
        return {"ema_momentum": momentum}
