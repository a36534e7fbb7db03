"""Copy a GPU's tensors to host memory while training goes on.

The copies are made on a stream of their own, and the host waits for none of them. Work that it
queues afterwards waits on the device until the tensors have been read, so that it may change them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class SideStream:
    """Copies of one state. `cuda` is torch.cuda; tests pass a stand-in that records what it is asked."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._stream: Any = None

    def copy(self, tensor: "Tensor") -> "Tensor":
        """Return a copy in pinned host memory, which is whole once what `close` returns has been called."""
        import torch  # here, since a task may save nothing that needs it

        if self._stream is None:
            self._stream = self._cuda.Stream()
            self._stream.wait_stream(self._cuda.current_stream())
        host = torch.empty_like(tensor, device="cpu", pin_memory=self._cuda.is_available())
        with self._cuda.stream(self._stream):
            return host.copy_(tensor.detach(), non_blocking=True)

    def close(self) -> Callable[[], None]:
        """Let the work that is queued from now on wait for the copies; return a function that waits for them on the host."""
        if self._stream is None:
            return nothing
        self._cuda.current_stream().wait_stream(self._stream)
        wait: Callable[[], None] = self._stream.record_event().synchronize
        return wait


def nothing() -> None:
    """Wait for no copy."""
