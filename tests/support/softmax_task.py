"""A trainer that knows nothing of CNN-JEPA: softmax regression on scikit-learn's digits, in NumPy. Only `Config` and `train` are needed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from sklearn.datasets import load_digits

from cnnjepa.run.files import read_json, to_json, write_atomic
from cnnjepa.run.folder import RunFolder, RunResult, RunStatus

OBJECTIVE = "holdout_accuracy"
UNIT = "%"
_TRAINED, _BATCH = 1200, 40


@dataclass
class Config:
    """Plain SGD from zero weights."""

    lr: float = 0.1
    decay: float = 0.0
    epochs: int = 6
    seed: int = 42
    pause_seconds: float = field(default=0.0, metadata={"neutral": True})  # after each epoch


def validate(config: Config, ranks: int = 1) -> None:
    """Raise ValueError for a rate that trains nothing."""
    if not config.lr > 0:
        raise ValueError(f"lr must be positive; got {config.lr}")


def train(
    config: Config,
    folder: RunFolder,
    should_stop: Callable[[], bool],
    claim: int,
    judge: Callable[[int, dict[str, float]], str],
) -> RunResult | None:
    """Train from the last saved epoch, and probe after each."""
    if (done := folder.result()) is not None:
        return done
    started, saved = time.monotonic(), folder.path / "weights.json"
    state = read_json(saved) if saved.exists() else {"epoch": 0, "weights": np.zeros((64, 10)).tolist()}
    print(f"begins after epoch {state['epoch']}", flush=True)
    images, labels = load_digits(return_X_y=True)
    x, y, weights = images / 16, labels, np.array(state["weights"])
    folder.open_metrics(state["epoch"])
    metrics: dict[str, float] = {}
    pruned = ""
    for epoch in range(state["epoch"] + 1, config.epochs + 1):
        for rows in np.random.default_rng((config.seed, epoch)).permutation(_TRAINED).reshape(-1, _BATCH):
            scores = np.exp(x[rows] @ weights)
            error = scores / scores.sum(1, keepdims=True) - np.eye(10)[y[rows]]
            weights -= config.lr * (x[rows].T @ error / _BATCH + config.decay * weights)
        right = (x[_TRAINED:] @ weights).argmax(1) == y[_TRAINED:]
        metrics = {OBJECTIVE: 100 * float(right.mean())}
        folder.record("step", epoch, {"epoch": float(epoch), "loss": 100 - metrics[OBJECTIVE], "lr": config.lr})
        folder.record("probe", epoch, {"epoch": float(epoch), **metrics})
        folder.sync()
        write_atomic(saved, to_json({"epoch": epoch, "weights": weights.tolist()}))
        time.sleep(config.pause_seconds)
        if epoch < config.epochs and (pruned := judge(epoch, metrics)):
            break
        if epoch < config.epochs and should_stop():
            folder.close()
            return None
    folder.close()
    status = RunStatus.pruned if pruned else RunStatus.completed
    seconds = time.monotonic() - started
    result = RunResult(status, pruned, {} if pruned else metrics, probes=folder.probes(), step=epoch, seconds=seconds, claim=claim)
    folder.write_result(result)
    return folder.result()
