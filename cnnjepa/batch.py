"""What a method is given for one micro-batch."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass
class Batch:
    """One micro-batch of normalised views on the device, and where it stands in the run."""

    views: list[Tensor]  # each [B, 3, S, S], in the training precision
    step: int  # 0-based optimiser step
    positions: npt.NDArray[np.int64]  # [B] positions in the global batch of that step
    labels: Tensor | None = None  # [B] classes, -1 for images whose labels are held out; for `supervised` alone

    def pictures(self) -> dict[str, Tensor]:
        """Each view for the log, at most 8 samples."""
        return {f"view{i + 1}": view[:8] for i, view in enumerate(self.views)}
