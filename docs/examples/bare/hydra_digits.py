"""Train a linear classifier on scikit-learn's digits, configured by Hydra: python hydra_digits.py optimizer.lr=0.5."""

import os
from pathlib import Path

import hydra
import numpy as np
from omegaconf import DictConfig
from sklearn.datasets import load_digits


@hydra.main(version_base="1.3", config_path="conf", config_name="digits")
def train(config: DictConfig) -> None:
    images, labels = load_digits(return_X_y=True)
    x, y, weights, begun = images / 16, labels, np.zeros((64, 10)), 0
    saved, new = Path(config.folder) / "weights.npz", Path(config.folder) / "new.npz"
    if saved.exists():
        begun, weights = np.load(saved)["epoch"], np.load(saved)["weights"]
    for epoch in range(int(begun) + 1, config.epochs + 1):
        for rows in np.random.default_rng((config.seed, epoch)).permutation(1200).reshape(-1, config.batch):
            scores = np.exp(x[rows] @ weights)
            error = scores / scores.sum(1, keepdims=True) - np.eye(10)[y[rows]]
            weights -= config.optimizer.lr * (x[rows].T @ error / config.batch + config.optimizer.decay * weights)
        accuracy = 100 * float(((x[1200:] @ weights).argmax(1) == y[1200:]).mean())
        print(f"epoch {epoch}: accuracy {accuracy:.1f} %")
        np.savez(new, epoch=epoch, weights=weights)
        os.replace(new, saved)


if __name__ == "__main__":
    train()
