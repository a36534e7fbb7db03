"""Classify points: AdamW, a cosine schedule, dropout, BatchNorm, an average of the weights, three libraries' random numbers."""

import copy
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from jobs.plain import PlainTask


@dataclass
class Config:
    lr: float = 0.01
    epochs: int = 8
    seed: int = 1


def points(count=300):
    draw = np.random.default_rng(0)
    labels = draw.integers(10, size=count)
    centres = draw.normal(size=(10, 16))
    return torch.tensor(centres[labels] + draw.normal(size=(count, 16)), dtype=torch.float32), torch.tensor(labels)


def train(config, run):
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    x, y = points()
    order = torch.Generator().manual_seed(config.seed)
    loader = DataLoader(TensorDataset(x[:240], y[:240]), batch_size=40, shuffle=True, generator=order)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    first = 0
    if (state := run.restore()) is not None:
        first = state["epoch"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        order.set_state(state["order"])
        torch.set_rng_state(state["torch"])
        kind, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))

    for epoch in range(first + 1, config.epochs + 1):
        model.train()
        total = 0.0
        for inputs, targets in loader:
            inputs = inputs * random.uniform(0.8, 1.2)
            inputs = inputs + torch.tensor(np.random.normal(0, 0.1, inputs.shape), dtype=torch.float32)
            loss = nn.functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for mean, new in zip(average.state_dict().values(), model.state_dict().values()):
                    mean.copy_(0.9 * mean + 0.1 * new)
            total += loss.item()
        scheduler.step()
        model.eval()
        average.eval()
        with torch.no_grad():
            held_out = nn.functional.cross_entropy(model(x[240:]), y[240:]).item()
            averaged = nn.functional.cross_entropy(average(x[240:]), y[240:]).item()
        run.report(epoch, loss=total, held_out=held_out, averaged=averaged)
        kind, keys, position, has_gauss, cached = np.random.get_state()
        run.save(
            {
                "epoch": epoch,
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "order": order.get_state(),
                "torch": torch.get_rng_state(),
                "numpy": [kind, keys.tolist(), position, has_gauss, cached],
                "python": list(random.getstate()),
            }
        )
        if run.should_stop:
            return


TASK = PlainTask(Config, train, objective="loss", direction="minimize")
