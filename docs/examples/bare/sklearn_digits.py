"""Fit a linear classifier to scikit-learn's digits, a pass over the data at a time."""

from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier


@dataclass
class Config:
    alpha: float = 1e-4
    penalty: str = "l2"
    epochs: int = 6
    seed: int = 42


def train(config: Config) -> None:
    x, y = load_digits(return_X_y=True)
    model = SGDClassifier(loss="log_loss", alpha=config.alpha, penalty=config.penalty, random_state=config.seed)
    for epoch in range(1, config.epochs + 1):
        order = np.random.default_rng((config.seed, epoch)).permutation(1200)
        model.partial_fit(x[order] / 16, y[order], classes=range(10))
        print(f"epoch {epoch}: error {1 - model.score(x[1200:] / 16, y[1200:]):.4f}")


if __name__ == "__main__":
    train(Config())
