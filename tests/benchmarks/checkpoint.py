"""For how long does a checkpoint hold training up? CNN-JEPA with a ResNet-50 and AdamW's moments, written to this disk.

    python tests/benchmarks/checkpoint.py [--json] [--rounds 5] [--folder DIR] [--batch 2]

Held up is the copy to host memory, and what the steps that run while the thread writes, reads back and prunes take longer than the median
step of the same round before it. `blocking` is what the loop would wait if it wrote the file itself. The share is of the default interval.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from _report import publish
from methods import build, pixels, settings, take_step
from rich.table import Table

from cnnjepa.config import CheckpointConfig, Precision
from cnnjepa.run import checkpoint
from cnnjepa.run.ranks import Device, joined
from cnnjepa.run.saver import Saver, host_copy
from cnnjepa.training_run import Run

STEPS_BEFORE = 8


def nothing() -> None:
    """No metrics have to be made durable."""


def timed_step(run: Run, loaded: object) -> float:
    """Seconds of one optimiser step, by the clock."""
    started = time.perf_counter()
    take_step(run, loaded)
    return time.perf_counter() - started


def beside_training(run: Run, loaded: object, saver: Saver) -> tuple[float, float, float]:
    """Seconds for the copy, lost by steps beside the thread, and until the checkpoint was published."""
    usual = statistics.median(timed_step(run, loaded) for _ in range(STEPS_BEFORE))
    started = time.perf_counter()
    saver.begin(run.step, run.state(), nothing)
    copied = time.perf_counter() - started
    slower = 0.0
    while saver.writing:
        slower += timed_step(run, loaded) - usual
    return copied, slower, time.perf_counter() - started


def main() -> int:
    """The command line; exit status 1 where training is held up for 1 % of the interval or more."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; default: the temporary folder")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    interval = 60 * CheckpointConfig().every_minutes
    copies, losses, written, blocking = [], [], [], []
    with joined(Device.auto) as ranks, tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        run = build(settings("cnn_jepa", asked.batch, Precision.fp32, 1), ranks, asked.batch)
        loaded = pixels(run.method.views(run.config), asked.batch)
        take_step(run, loaded)
        size = checkpoint.nbytes(run.state())
        for _ in range(asked.rounds):
            saver = Saver(Path(folder), float("inf"), keep=2)
            copied, slower, seconds = beside_training(run, loaded, saver)
            copies.append(copied)
            losses.append(max(slower, 0.0))
            written.append(seconds)
            started = time.perf_counter()
            checkpoint.save(Path(folder), run.step + 1, host_copy(run.state()), keep=2)
            blocking.append(time.perf_counter() - started)
    held = [c + s for c, s in zip(copies, losses, strict=True)]
    figures = {
        "megabytes": size / 1e6,
        "copy_s": statistics.median(copies),
        "slower_steps_s": statistics.median(losses),
        "held_up_s": statistics.median(held),
        "held_up_s_max": max(held),
        "held_up_percent": 100 * statistics.median(held) / interval,
        "published_after_s": statistics.median(written),
        "blocking_s": statistics.median(blocking),
        "blocking_percent": 100 * statistics.median(blocking) / interval,
    }
    table = Table("figure", "value", title="one checkpoint, medians")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3g}")
    publish(asked.json, asked.rounds, figures, table, [])
    return 0 if figures["held_up_percent"] < 1 else 1


if __name__ == "__main__":
    sys.exit(main())
