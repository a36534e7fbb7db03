"""Read what all ranks must know of a step, on a GPU one step late, so that the loop need not wait for the device.

A host that reads a number of the device waits for all work that is queued there, and the device
then waits for the host. So a GPU's numbers are read when the next step's work has been queued. A
step that is recorded, probed or saved reads its own numbers before the weights change, and those of
the step before it: what a loss that is not finite has touched is never recorded, probed or saved.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnnjepa.run.copies import SideStream, nothing


class Seen(NamedTuple):
    """The numbers of one step: means over ranks, and the gradient norm."""

    loss: float
    visible: float
    stop: float  # above 0 if a rank was asked to stop
    save: float  # above 0 if a checkpoint is due
    failed: float  # above 0 if a rank's loader has failed
    norm: float

    @property
    def is_finite(self) -> bool:
        """Return whether the weights may change by this step."""
        return bool(np.isfinite(self.loss) and np.isfinite(self.norm))


class Numbers:
    """The numbers of step `step`, on their way to the host."""

    def __init__(self, values: Tensor, step: int, lr: float) -> None:
        self.step, self.lr = step, lr
        self._host, self._wait = values, nothing
        if values.is_cuda:
            side = SideStream(torch.cuda)
            self._host, self._wait = side.copy(values), side.close()

    def read(self) -> Seen:
        """Return the numbers; wait until the device has computed them, but for nothing that was queued later."""
        self._wait()
        return Seen(*self._host.tolist())


class Verdicts:
    """Read each step's numbers: at once, or with `late` when the next step's work is queued."""

    def __init__(self, judge: Callable[[Numbers], Seen], late: bool) -> None:
        """Take `judge`, which reads the numbers of a step and raises if they end the run."""
        self._judge, self._late = judge, late
        self._unread: Numbers | None = None

    def of(self, numbers: Numbers, now: bool) -> Seen | None:
        """Return what is read of the step, or None if it is read later; judge the step before in any case.

        It is read if `now`, or if a rank wished in the step before to stop or to save. What is
        returned has the wishes of both steps. All ranks decide alike.
        """
        before, self._unread = None if self._unread is None else self._judge(self._unread), None
        wished = before is not None and (before.stop or before.save)
        if self._late and not now and not wished:
            self._unread = numbers
            return None
        seen = self._judge(numbers)
        return seen if before is None else seen._replace(stop=max(seen.stop, before.stop), save=max(seen.save, before.save))


def reads_late(device: torch.device) -> bool:
    """Return whether numbers are read a step late: on a CPU nothing is gained."""
    return device.type == "cuda"
