"""Save checkpoints in the background; on a CPU training waits for a copy to host memory, on a GPU not even for that.

A disk that refuses a write does not stop training: the save is retried, and records wait in memory.
Only a run that ends or is stopped waits for the disk, and fails if it does not recover in time.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cnnjepa.run import checkpoint, refusal
from cnnjepa.run.copies import SideStream

log = logging.getLogger(__name__)
RETRY_SECONDS = 60.0  # until a refused save is retried, unless the interval is shorter
# Slurm soon ends a preempted run; a run that fails at its end loses all its hours.
PATIENCE_AT_STOP_SECONDS = 60.0
PATIENCE_AT_END_SECONDS = 600.0
_PAUSE_SECONDS = 0.5

T = TypeVar("T")


def retry(write: Callable[[], T], what: str, patience_seconds: float, refused: Callable[[OSError | None], None] = lambda _: None) -> T:
    """Return the result of `write`, retrying on OSError; re-raise it when patience ends.

    `refused` is told each new cause, and None in the end.
    """
    deadline, reported = time.monotonic() + patience_seconds, ""
    while True:
        try:
            result = write()
            refused(None)
            return result
        except OSError as error:
            if time.monotonic() + _PAUSE_SECONDS > deadline:
                raise
            if str(error) != reported:
                reported = str(error)
                refused(error)
                log.warning("%s cannot be written: %s; trying again for up to %.0f s", what, reported, patience_seconds)
        time.sleep(_PAUSE_SECONDS)


def host_copy(state: Any, side: SideStream | None = None) -> Any:
    """Return `state` with each tensor copied to host memory, where training does not change it.

    Tensors of a GPU are copied through `side`, if that is given.
    """
    import torch  # here, since a task may save nothing that needs it

    if isinstance(state, torch.Tensor):
        return side.copy(state) if side is not None and state.is_cuda else state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: host_copy(value, side) for key, value in state.items()}
    return [host_copy(value, side) for value in state] if isinstance(state, list) else state


def begun_copy(state: Any) -> tuple[Any, Callable[[], None]]:
    """Return a copy of `state` in host memory, and a function that waits until it is whole; training may go on at once."""
    import torch

    side = SideStream(torch.cuda)
    copied = host_copy(state, side)
    return copied, side.close()


class Saver:
    """Background saver of one run, on the main rank; at most one save at a time."""

    def __init__(self, folder: Path, interval_seconds: float, keep: int, attempt: int = 0) -> None:
        self._folder, self._interval, self._keep, self._attempt = folder, interval_seconds, keep, attempt
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._reported = ""
        self._next = time.monotonic() + interval_seconds
        self._saved = -1  # the last published step

    @property
    def writing(self) -> bool:
        """Return whether the thread is running."""
        return self._thread is not None and self._thread.is_alive()

    def due(self) -> bool:
        """Return whether to save now; raise a failed save's error unless the disk caused it."""
        if not self.writing:
            self.settle()
        # Without an interval, the loop waits and saves every step; otherwise a slow save skips one.
        return time.monotonic() >= self._next and (not self.writing or not self._interval)

    def begin(self, step: int, state: dict[str, Any], first: Callable[[], None]) -> None:
        """Copy `state` and publish the copy, after `first` has made durable what it relies on."""
        self.settle()
        self._next = time.monotonic() + self._interval
        try:
            first()
        except OSError as error:
            self._refused(step, error)
            return
        self._thread = threading.Thread(target=self._write, args=(step, *begun_copy(state)), name="checkpoint")
        self._thread.start()

    def _write(self, step: int, state: dict[str, Any], wait: Callable[[], None]) -> None:
        try:
            wait()
            checkpoint.save(self._folder, step, state, self._keep, self._attempt)
            self._saved, self._reported = step, ""
            self.note(None)
        except OSError as error:
            self._refused(step, error)
        except BaseException as error:  # raised in the training loop
            self._error = error

    def _refused(self, step: int, error: OSError) -> None:
        again = min(RETRY_SECONDS, self._interval)
        self._next = time.monotonic() + again
        if str(error) != self._reported:
            self._reported = str(error)
            self.note(error)
            log.warning("no checkpoint at step %d: %s; training continues, next attempt in %.0f s", step, error, again)

    def note(self, error: OSError | None) -> None:
        """Let `status` say why the disk refuses writes, or that it takes them again."""
        refusal.note(self._folder.parent, self._attempt, error)

    def settle(self) -> None:
        """Wait for a running save; raise a failed save's error unless the disk caused it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self, step: int, state: dict[str, Any], first: Callable[[], None], patience_seconds: float, final: bool) -> None:
        """Publish `state` now, a final one on top of `keep`; raise OSError when patience ends."""
        self.settle()

        def write() -> None:
            first()
            if self._saved != step:
                checkpoint.save(self._folder, step, state, self._keep + final, self._attempt)

        retry(write, f"the checkpoint at step {step}", patience_seconds, self.note)
        self._saved, self._next = step, time.monotonic() + self._interval
