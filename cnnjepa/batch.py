"""What a method is given for one micro-batch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass
class Batch:
    """One micro-batch of normalised views on the device, and where it stands in the run."""

    views: list[Tensor]  # each [B, 3, S, S], in the training precision
    step: int  # 0-based optimiser step
    positions: npt.NDArray[np.int64]  # [B] positions in the global batch of that step
    labels: Tensor | None = None  # [B] classes, -1 for images whose labels are held out; for `supervised` alone
    shown: dict[str, Tensor] | None = None  # where features are left for the log; None where nobody looks at this micro-batch

    def show(self, name: str, pooled: Callable[[], Tensor]) -> None:
        """Leave the features [B, D] that `pooled` gives, one vector an image, for the log; it is not called where nobody looks."""
        if self.shown is not None:
            with torch.no_grad():
                self.shown[name] = pooled().detach().float()

    def showing(self, name: str, features_BD: Tensor) -> Tensor:
        """`features_BD` itself, which `show` is given."""
        self.show(name, lambda: features_BD)
        return features_BD

    def pictures(self) -> dict[str, Tensor]:
        """Each view for the log, at most 8 samples."""
        return {f"view{i + 1}": view[:8] for i, view in enumerate(self.views)}
