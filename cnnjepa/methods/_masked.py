"""Base of methods whose encoder sees a masked image: masks that follow from (seed, step, position)."""

from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from cnnjepa.batch import Batch
from cnnjepa.config import grid_size
from cnnjepa.masking import draw_visible
from cnnjepa.methods._base import BaseMethod
from cnnjepa.models.masked import Visibility

Settings = TypeVar("Settings", bound=Any)  # a MethodConfig with `mask`, a MaskConfig


class MaskedMethod(BaseMethod[Settings]):
    """A method with a mask for each image. `grid` is the number of cells per side."""

    @cached_property
    def grid(self) -> int:
        """Return the cells per side of the masks."""
        return grid_size(self.config)

    def visibility(self, batch: Batch) -> Visibility:
        """Return the masks of a batch, on its device."""
        mask = draw_visible(self.settings.mask, self.grid, self.config.seed, batch.step, batch.positions)
        return Visibility(torch.from_numpy(mask), batch.views[0].device)

    @torch.no_grad()
    def sample_images(self, batch: Batch) -> dict[str, Tensor]:
        """Return at most 8 normalised images to log, their hidden cells black."""
        images = batch.views[0]
        return {"masked": (images * self.visibility(batch).at(images))[:8]}
