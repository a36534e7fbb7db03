"""A trainer of a few lines that needs only Python, and writes down when it trains: each epoch of each trial, and in which job.

It looks for the minimum of a parabola from noisy gradients, drawn from (seed, epoch).
"""

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cnnjepa.run.files import read_json, to_json, write_atomic
from cnnjepa.run.folder import RunFolder, RunResult, RunStatus

OBJECTIVE = "closeness"
UNIT = "%"
TRAINED = "trained.jsonl"  # in the run folder: a line for each start (epoch 0), and for each epoch that was ever computed


@dataclass
class Config:
    """Gradient descent in one dimension."""

    lr: float = 0.1
    epochs: int = 4
    seed: int = 42
    pause_seconds: float = field(default=0.0, metadata={"neutral": True})  # in each epoch


def own_job() -> str:
    """Return the job around this process as sacct writes it: 12_3, or 12 without an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")


def note(folder: RunFolder, epoch: int, since: float) -> float:
    """Write down that this job has trained `epoch` since then; return the time."""
    now = time.time()
    with open(folder.path / TRAINED, "a") as file:
        file.write(json.dumps({"job": own_job(), "epoch": epoch, "from": since, "to": now}) + "\n")
    return now


def train(
    config: Config,
    folder: RunFolder,
    should_stop: Callable[[], bool],
    claim: int,
    judge: Callable[[int, dict[str, float]], str],
) -> RunResult | None:
    """Train from the last saved epoch."""
    if (done := folder.result()) is not None:
        return done
    started, saved = time.monotonic(), folder.path / "weight.json"
    state = read_json(saved) if saved.exists() else {"epoch": 0, "weight": 0.0}
    print(f"begins after epoch {state['epoch']}", flush=True)
    since = note(folder, 0, time.time())
    folder.open_metrics(state["epoch"])
    weight, metrics = state["weight"], {OBJECTIVE: 0.0}
    for epoch in range(state["epoch"] + 1, config.epochs + 1):
        draw = random.Random(f"{config.seed} {epoch}")
        for _ in range(100):
            weight -= config.lr * (2 * (weight - 1) + draw.gauss(0, 0.1))
        metrics = {OBJECTIVE: 100 - abs(weight - 1)}
        folder.record("step", epoch, {"epoch": float(epoch), "loss": (weight - 1) ** 2, "lr": config.lr})
        folder.record("probe", epoch, {"epoch": float(epoch), **metrics})
        folder.sync()
        write_atomic(saved, to_json({"epoch": epoch, "weight": weight}))
        if epoch < config.epochs:
            judge(epoch, metrics)
        time.sleep(config.pause_seconds)
        since = note(folder, epoch, since)
        if epoch < config.epochs and should_stop():
            folder.close()
            return None
    folder.close()
    seconds = time.monotonic() - started
    result = RunResult(RunStatus.completed, "", metrics, probes=folder.probes(), step=config.epochs, seconds=seconds, claim=claim)
    folder.write_result(result)
    return folder.result()
