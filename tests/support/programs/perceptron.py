"""A perceptron in NumPy alone: momentum, averaged weights, a rate that decays by the step, rows shuffled in place."""

from dataclasses import dataclass

import numpy as np

from jobs.plain import PlainTask


@dataclass
class Config:
    lr: float = 0.5
    epochs: int = 8
    seed: int = 5


def softmax(scores):
    raised = np.exp(scores - scores.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def train(config, run):
    rng = np.random.default_rng(config.seed)
    fixed = np.random.default_rng(0)
    labels = fixed.integers(5, size=200)
    images = fixed.normal(size=(5, 12))[labels] + fixed.normal(size=(200, 12))
    weights = np.zeros((12, 5))
    velocity = np.zeros_like(weights)
    mean = weights.copy()
    rows = np.arange(150)
    steps = epoch = 0
    saved = run.restore()
    if saved is not None:
        epoch = saved["epoch"]
        steps = saved["steps"]
        weights = np.array(saved["weights"])
        velocity = np.array(saved["velocity"])
        mean = np.array(saved["mean"])
        rows = np.array(saved["rows"])
        rng.bit_generator.state = saved["rng"]
    while epoch < config.epochs:
        rng.shuffle(rows)
        for batch in rows.reshape(-1, 30):
            noisy = images[batch] + rng.normal(0, 0.2, (30, 12))
            gradient = noisy.T @ (softmax(noisy @ weights) - np.eye(5)[labels[batch]]) / 30
            rate = config.lr / (1 + 0.1 * steps)
            velocity = 0.8 * velocity + gradient
            weights = weights - rate * velocity
            mean = 0.95 * mean + 0.05 * weights
            steps += 1
        epoch += 1
        chosen = softmax(images[150:] @ weights)[np.arange(50), labels[150:]]
        averaged = softmax(images[150:] @ mean)[np.arange(50), labels[150:]]
        run.report(epoch, loss=float(-np.log(chosen).mean()), averaged_loss=float(-np.log(averaged).mean()))
        run.save(
            {
                "epoch": epoch,
                "steps": steps,
                "weights": weights.tolist(),
                "velocity": velocity.tolist(),
                "mean": mean.tolist(),
                "rows": rows.tolist(),
                "rng": rng.bit_generator.state,
            }
        )
        if run.should_stop:
            break


TASK = PlainTask(Config, train, objective="loss", direction="minimize")
