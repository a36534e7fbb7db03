"""Which learning rate for a small network on scikit-learn's digits? In plain PyTorch."""

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from sweeps import Configuration, PlainTask, SweepSpec, main


@dataclass
class Config:
    lr: float = 0.01
    width: int = 32
    epochs: int = 6
    seed: int = 42


def train(config: Config, run) -> None:
    torch.manual_seed(config.seed)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    layers = [torch.nn.Linear(64, config.width), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(config.width, 10)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    if state := run.restore():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
    for epoch in run.epochs():
        model.train()
        for rows in torch.randperm(1200).split(40):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            scores = model(x[1200:])
        loss, right = cross_entropy(scores, y[1200:]), (scores.argmax(1) == y[1200:]).float().mean()
        run.report(epoch, loss=loss, accuracy=100 * right)
        run.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()})


TASK = PlainTask(Config, train, objective="accuracy", unit="%")
SWEEP = SweepSpec(configurations=[Configuration({"lr": 0.001}), Configuration({"lr": 0.01})], task=TASK)

if __name__ == "__main__":
    main(SWEEP)
