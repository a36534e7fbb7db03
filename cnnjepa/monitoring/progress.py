"""Show a run's progress: a bar with images/s and remaining time on a terminal, lines in a log."""

import contextlib
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """Display of steps, loss, learning rate, images/s and remaining time on the main rank."""

    def __init__(self, total_steps: int, start_step: int, images_per_step: int, shown: bool) -> None:
        self.total_steps, self.images_per_step, self.shown = total_steps, images_per_step, shown
        self._bar: Progress | None = None
        self._last = time.perf_counter(), start_step
        self._started = self._last
        if shown and sys.stdout.isatty():
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=Console(file=sys.stdout))
            self._task = self._bar.add_task("starting", total=total_steps, completed=start_step)

    def __enter__(self) -> "TrainingProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def images_per_second(self, step: int) -> float:
        """Return images per second over all ranks since the last call."""
        now = time.perf_counter()
        then, then_step = self._last
        self._last = now, step
        return (step - then_step) * self.images_per_step / max(now - then, 1e-9)

    def show(self, step: int, epoch: float, loss: float, lr: float, images_per_second: float) -> None:
        """Show the progress after `step` optimiser steps."""
        if not self.shown:
            return
        text = f"epoch {epoch:.2f}  loss {loss:.4f}  lr {lr:.2e}  {images_per_second:.0f} images/s"
        if self._bar:
            self._bar.update(self._task, completed=step, description=text)
            return
        then, then_step = self._started
        pace = (time.perf_counter() - then) / max(step - then_step, 1)
        with contextlib.suppress(OSError):  # a log on a full disk must not stop training
            print(f"step {step}/{self.total_steps}  {text}  {(self.total_steps - step) * pace / 60:.1f} min left", flush=True)
