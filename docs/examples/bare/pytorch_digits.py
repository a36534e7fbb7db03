"""Train a small network on scikit-learn's digits, in plain PyTorch."""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy


@dataclass
class Config:
    lr: float = 0.01
    width: int = 32
    epochs: int = 6
    seed: int = 42


def train(config: Config) -> None:
    torch.manual_seed(config.seed)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    layers = [torch.nn.Linear(64, config.width), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(config.width, 10)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    for epoch in range(1, config.epochs + 1):
        model.train()
        for rows in torch.randperm(1200).split(40):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            scores = model(x[1200:])
        loss, right = cross_entropy(scores, y[1200:]), (scores.argmax(1) == y[1200:]).float().mean()
        print(f"epoch {epoch}: loss {loss:.4f}, accuracy {100 * right:.1f} %")


if __name__ == "__main__":
    train(Config())
