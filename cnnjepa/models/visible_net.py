"""Compute only what a mask leaves visible, in a CNN of torchvision, timm or your own: `visible`.

    from cnnjepa.models import visible

    net = visible(model)                     # the same parameters; refuses a layer that it does not know by name
    features = net(image_BCHW, visible_Bhw)  # [B, C, h, w], zero where hidden

docs/guides/visible.md says what each layer means under a mask.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnnjepa.models.masked import Visibility, hide
from cnnjepa.models.visible_call import Pass
from cnnjepa.models.visible_plan import Plan
from cnnjepa.models.visible_tiles import WideTileMap


class VisibleNet(nn.Module):
    """A network that computes the features of another one from visible cells alone.

    `model` is that other network, whose parameters, buffers and modes it uses. `cell` is the number of pixels per side of
    a cell of the mask, and `stage_names` are the modules whose maps it returns if asked for stages.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.plan = Plan(model)
        self.cell = self.plan.cell
        self.stage_names = self._stage_names()
        self.training = model.training

    def __reduce__(self) -> Any:
        """Copy and pickle the network alone, and wrap the copy."""
        return visible, (self.model,)

    def _stage_names(self) -> list[str]:
        """Return timm's names of its stages, else the last child of the network at each resolution."""
        info = getattr(self.model, "feature_info", None)
        listed = [entry["module"] for entry in (info if isinstance(info, list) else [])]
        if listed and all(name in self.plan.stages for name in listed):
            return listed
        last = {self.plan.reduction(path): path for path in self.plan.stages if "." not in path}
        return [last[reduction] for reduction in sorted(last)]

    def forward(self, image_BCHW: Tensor, visible_Bhw: Tensor | None = None, stages: bool | Sequence[str] = False) -> Tensor | list[Tensor]:
        """Return the last feature map, [B, C, h, w], zero where hidden.

        `visible_Bhw` is a bool mask [B, h, w] or [B, 1, h, w], True where visible, with a cell for each `cell` x `cell`
        pixels; without one, all is visible. With `stages`, return the maps of all `stage_names`, or of the modules that are
        named, as a list. Raise ValueError if image and mask do not fit.
        """
        visibility = self._visibility(image_BCHW, visible_Bhw)
        p = Pass(WideTileMap(visibility), self.cell, hide(image_BCHW, visibility))
        if stages is False:
            return self.plan.run(p, (self.plan.features,))[0]
        names = self.stage_names if stages is True else list(stages)
        unknown = [name for name in names if name not in self.plan.stages]
        if unknown:
            raise ValueError(f"visible: no module {', '.join(unknown)} with a feature map; there are {', '.join(self.plan.stages)}")
        return self.plan.run(p, tuple(self.plan.stages[name] for name in names))

    def _visibility(self, image_BCHW: Tensor, visible_Bhw: Tensor | None) -> Visibility:
        if image_BCHW.ndim != 4 or not image_BCHW.is_floating_point():
            raise ValueError(f"visible: images must be floating-point [B, C, H, W]; got {image_BCHW.dtype} {list(image_BCHW.shape)}")
        b, _, height, width = image_BCHW.shape
        if height % self.cell or width % self.cell:
            raise ValueError(f"visible: an image must be a multiple of {self.cell} pixels in both directions; got {height}x{width}")
        wanted = (b, height // self.cell, width // self.cell)
        if visible_Bhw is None:
            visible_Bhw = torch.ones(wanted, dtype=torch.bool)
        if visible_Bhw.ndim == 4 and visible_Bhw.shape[1] == 1:
            visible_Bhw = visible_Bhw[:, 0]
        if visible_Bhw.dtype is not torch.bool or tuple(visible_Bhw.shape) != wanted:
            given = f"{str(visible_Bhw.dtype).removeprefix('torch.')} {list(visible_Bhw.shape)}"
            raise ValueError(f"visible: a mask must be bool {list(wanted)}, one value for {self.cell}x{self.cell} pixels; got {given}")
        visibility = Visibility(visible_Bhw, image_BCHW.device)
        if not len(visibility.cells):
            raise ValueError("visible: a mask must leave at least one cell visible; got none")
        return visibility


def visible(model: nn.Module) -> VisibleNet:
    """Return a network that computes the features of `model` from the visible cells of its images alone.

    It shares all parameters and buffers with `model`, which stays as it is. Raise ValueError that names the layer and its
    class if `model` has one whose meaning under a mask is not known.
    """
    return VisibleNet(model)
