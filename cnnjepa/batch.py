"""The input of a method for one micro-batch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass
class Batch:
    """Hold one micro-batch of normalised views on the device, and its place in the run."""

    views: list[Tensor]  # each [B, C, S, S], in the training precision
    step: int  # 0-based optimiser step
    positions: npt.NDArray[np.int64]  # [B] positions in the global batch of that step
    labels: Tensor | None = None  # [B] classes, -1 where held out; only for `supervised`
    # features to log; None where this micro-batch is not logged
    shown: dict[str, Tensor] | None = None

    def show(self, name: str, pooled: Callable[[], Tensor]) -> None:
        """Store the features [B, D] that `pooled` returns, one vector per image, for the log.

        `pooled` is not called where this micro-batch is not logged.
        """
        if self.shown is not None:
            with torch.no_grad():
                self.shown[name] = pooled().detach().float()

    def showing(self, name: str, features_BD: Tensor) -> Tensor:
        """Pass `features_BD` to `show` and return it unchanged."""
        self.show(name, lambda: features_BD)
        return features_BD

    def pictures(self) -> dict[str, Tensor]:
        """Return each view for the log, at most 8 samples."""
        return {f"view{i + 1}": view[:8] for i, view in enumerate(self.views)}
