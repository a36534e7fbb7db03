"""Logistic regression in plain Python, one example at a time; no library but the standard one."""

import math
import random
import time
from dataclasses import dataclass

from jobs.plain import PlainTask


@dataclass
class Config:
    lr: float = 0.3
    epochs: int = 10
    seed: int = 7


def examples():
    draw = random.Random(0)
    return [([draw.gauss(side, 1) for side in (label, -label, 0.5)], label > 0) for label in [-1, 1] * 40]


def train(config, run):
    draw = random.Random(config.seed)
    known = examples()
    weights, epoch = [0.0, 0.0, 0.0], 0
    started = time.time()
    if (state := run.restore()) is not None:
        weights, epoch = list(state["weights"]), state["epoch"]
        version, words, gauss = state["draw"]
        draw.setstate((version, tuple(words), gauss))
    while epoch < config.epochs:
        rate = config.lr / (1 + epoch)
        wrong = 0.0
        for values, positive in draw.sample(known, 60):
            probability = 1 / (1 + math.exp(-sum(w * v for w, v in zip(weights, values))))
            weights = [w - rate * (probability - positive) * v for w, v in zip(weights, values)]
            wrong += abs(probability - positive)
        epoch += 1
        run.report(epoch, error=wrong / 60, seconds=time.time() - started)
        run.save({"epoch": epoch, "weights": weights, "draw": list(draw.getstate())})
        if run.should_stop:
            return


TASK = PlainTask(Config, train, objective="error", direction="minimize")
