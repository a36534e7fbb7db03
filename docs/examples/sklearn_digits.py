"""Which penalty for a linear classifier on scikit-learn's digits? The fitted model itself is saved."""

from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier

from sweeps import Configuration, PlainTask, SweepSpec, main


@dataclass
class Config:
    alpha: float = 1e-4
    penalty: str = "l2"
    epochs: int = 6
    seed: int = 42


def train(config: Config, run) -> None:
    x, y = load_digits(return_X_y=True)
    model = SGDClassifier(loss="log_loss", alpha=config.alpha, penalty=config.penalty, random_state=config.seed)
    model = run.restore() or model
    for epoch in run.epochs():
        order = np.random.default_rng((config.seed, epoch)).permutation(1200)
        model.partial_fit(x[order] / 16, y[order], classes=range(10))
        run.report(epoch, error=1 - model.score(x[1200:] / 16, y[1200:]))
        run.save(model)


TASK = PlainTask(Config, train, objective="error", direction="minimize", pickled=True)
SWEEP = SweepSpec(configurations=[Configuration({"penalty": "l2"}), Configuration({"penalty": "l1"})], task=TASK)

if __name__ == "__main__":
    main(SWEEP)
