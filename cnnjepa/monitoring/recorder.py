"""Record a run to metrics.jsonl and TensorBoard; disk errors do not stop training."""

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cnnjepa.config import TrainConfig
from cnnjepa.run.attempts import lost
from cnnjepa.run.folder import RunFolder

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)
_REOPEN_SECONDS = 60.0
_FLUSH_SECONDS = 60.0


def hyperparameters(config: Any, path: str = "") -> dict[str, str | int | float]:
    """Return the hyperparameters that can change a run's result, by key.

    Flags and lists become text, because TensorBoard's numbers can represent neither.
    """
    flat: dict[str, str | int | float] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata.get("neutral"):
            continue
        if dataclasses.is_dataclass(value):
            flat |= hyperparameters(value, f"{path}{f.name}.")
        elif isinstance(value, Enum):
            flat[path + f.name] = value.name
        else:
            plain = isinstance(value, (int, float)) and not isinstance(value, bool)
            flat[path + f.name] = value if plain else str(value)
    return flat


class _Told:
    """A hook for errors of threads without the disk errors of TensorBoard's thread: the next call raises them too."""

    def __init__(self, hook: Callable[[threading.ExceptHookArgs], Any]) -> None:
        self._hook = hook

    def __call__(self, failed: threading.ExceptHookArgs) -> None:
        """Pass on what is no such error."""
        if not (type(failed.thread).__name__ == "_AsyncWriterThread" and isinstance(failed.exc_value, OSError)):
            self._hook(failed)


class _Board:
    """TensorBoard's file. After a disk error a new one is opened, and begins with the numbers that the old one lacks.

    Pictures and histograms of the meantime are lost.
    """

    def __init__(self, run: RunFolder, step: int, config: TrainConfig) -> None:
        from torch.utils.tensorboard.summary import hparams

        self._run, self._next, self._flush_at = run, 0.0, 0.0
        # Omit the experiment summary: TensorBoard would use the first run's for all, with the keys
        # of its method only. From the runs' own summaries, it finds all keys and which of them
        # differ.
        _, self._start, self._end = hparams(hyperparameters(config), {})
        self._is_complete = False
        self._kept: list[tuple[tuple[Any, ...], int, float]] = []  # numbers since the last flush, with step and time
        self._writer: SummaryWriter | None = None
        if not isinstance(threading.excepthook, _Told):
            threading.excepthook = _Told(threading.excepthook)
        self._open(step)

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # the other ranks do not need it

        run = self._run
        # A file that is opened later would hide the points of the attempt that has taken over.
        if lost(run.path, run.attempt):
            self._next, self._kept = math.inf, []
            return
        by = f".{run.attempt:06d}" if run.attempt else ""
        try:
            self._writer = SummaryWriter(str(run.tensorboard), purge_step=step, filename_suffix=by)
            self._writer._get_file_writer().add_summary(self._start)
            for values, at, when in self._kept:
                self._writer.add_scalar(values[0], values[1], at, when)
            if self._is_complete:
                self._writer._get_file_writer().add_summary(self._end)
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        self._writer, self._next = None, time.monotonic() + _REOPEN_SECONDS
        log.warning("TensorBoard's file cannot be written: %s; trying again in %.0f s", error, _REOPEN_SECONDS)

    def tell(self, call: str, step: int, *values: Any) -> None:
        """Call `SummaryWriter.<call>(*values, step)`."""
        if self._next == math.inf:
            return
        if call == "add_scalar":
            self._kept.append((values, step, time.time()))
        if self._writer is None:
            if time.monotonic() >= self._next:
                self._open(self._kept[0][1] if self._kept else step)
        else:
            self._attempt(lambda writer: getattr(writer, call)(*values, step))
        if time.monotonic() >= self._flush_at:
            self._flush()

    def _flush(self) -> bool:
        """Return whether all numbers are in the file."""
        self._flush_at = time.monotonic() + _FLUSH_SECONDS
        if done := self._attempt(lambda writer: writer.flush()):
            self._kept.clear()
        return done

    def complete(self) -> None:
        """Mark the run as complete."""
        self._is_complete = True
        self._attempt(lambda writer: writer._get_file_writer().add_summary(self._end))

    def close(self) -> None:
        """Flush and close the file, after one more try to write what it lacks."""
        if not self._flush() and self._next != math.inf and self._kept:
            first = self._kept[0][1]
            self._open(first)
            if not self._flush():
                log.warning("TensorBoard's curves lack the numbers from step %d on; metrics.jsonl has them", first)
        self._attempt(lambda writer: writer.close())

    def _attempt(self, write: Callable[["SummaryWriter"], None]) -> bool:
        try:
            if self._writer is not None:
                write(self._writer)
                return True
        except OSError as error:
            self._lost(error)
        return False


class Recorder:
    """Records values at optimiser steps, on the main rank only."""

    def __init__(self, folder: RunFolder, step: int, is_main: bool, config: TrainConfig, source: int | None = None) -> None:
        """Continue the records that attempt `source` has up to `step`."""
        self.folder, self.is_main = folder, is_main
        self._board: _Board | None = None
        if is_main:
            folder.open_metrics(step, source)
            if config.log.tensorboard:
                self._board = _Board(folder, step + 1, config)

    @property
    def has_board(self) -> bool:
        """Return whether pictures and statistics are shown anywhere."""
        return self._board is not None

    def record(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write one record."""
        if not self.is_main:
            return
        self.folder.record(kind, step, values)
        self.scalars(step, {f"{kind}/{key}": value for key, value in values.items()})

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write numbers to TensorBoard only, by their full tags."""
        self._tell("add_scalar", step, values)

    def histograms(self, step: int, samples: dict[str, Tensor]) -> None:
        """Write histograms of values on the host, by their full tags."""
        self._tell("add_histogram", step, samples)

    def pictures(self, step: int, images: dict[str, Tensor]) -> None:
        """Write samples of what the method sees, [B, C, H, W] in any range; of four channels, the first three."""
        for key, all_channels in images.items() if self._board else ():
            pixels = all_channels[:, :3]
            low, high = pixels.amin(), pixels.amax()
            self._tell("add_images", step, {key: ((pixels - low) / (high - low).clamp_min(1e-6)).float().cpu()})

    def _tell(self, call: str, step: int, values: Mapping[str, Any]) -> None:
        for tag, value in values.items():
            if self._board:
                self._board.tell(call, step, tag, value)

    def complete(self) -> None:
        """Mark the run as complete; everything must be recorded before."""
        if self._board:
            self._board.complete()

    def close(self) -> None:
        """Flush and close all files."""
        if self._board:
            self._board.close()
        self.folder.close()
