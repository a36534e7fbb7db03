"""Regress with saves within an epoch: a sampler that knows its position, momentum, a warmup, a loss scaler. Everything is in a class."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Sampler, TensorDataset

from jobs.plain import PlainTask


@dataclass
class Config:
    lr: float = 0.02
    epochs: int = 6
    seed: int = 3


class Stream(Sampler):
    def __init__(self, count, seed):
        self.count, self.seed = count, seed
        self.round, self.done = 0, 0

    def __iter__(self):
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(1000 * self.seed + self.round)).tolist()
        while self.done < self.count:
            self.done += 1
            yield order[self.done - 1]
        self.round, self.done = self.round + 1, 0

    def __len__(self):
        return self.count


class Trainer:
    def __init__(self, config, run):
        self.config, self.run = config, run
        torch.manual_seed(config.seed)
        x = torch.randn(160, 8, generator=torch.Generator().manual_seed(0))
        self.data = TensorDataset(x, (x**2).sum(1, keepdim=True).sqrt())
        self.stream = Stream(len(self.data), config.seed)
        self.net = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 1))
        self.sgd = torch.optim.SGD(self.net.parameters(), lr=config.lr, momentum=0.9)
        self.warmup = torch.optim.lr_scheduler.LambdaLR(self.sgd, lambda step: min(1.0, (step + 1) / 40))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=9)
        self.step = 0

    def parts(self):
        return {"net": self.net, "sgd": self.sgd, "warmup": self.warmup, "scaler": self.scaler}

    def save(self):
        state = {name: part.state_dict() for name, part in self.parts().items()}
        self.run.save({"step": self.step, "round": self.stream.round, "done": self.stream.done, **state})

    def restore(self, state):
        self.step = state["step"]
        self.stream.round = state["round"]
        self.stream.done = state["done"]
        for name, part in self.parts().items():
            part.load_state_dict(state[name])

    def fit(self):
        loader = DataLoader(self.data, batch_sampler=BatchSampler(self.stream, 16, drop_last=True))
        while self.step < self.config.epochs * 10:
            for x, y in loader:
                loss = nn.functional.smooth_l1_loss(self.net(x), y)
                self.sgd.zero_grad()
                self.scaler.scale(loss).backward()
                self.scaler.step(self.sgd)
                self.scaler.update()
                self.warmup.step()
                self.step += 1
                if self.step % 4 == 0:
                    self.run.report(self.step, loss=loss.item(), scale=self.scaler.get_scale())
                    self.save()
                    if self.run.should_stop:
                        return
                if self.step == self.config.epochs * 10:
                    break


def train(config, run):
    trainer = Trainer(config, run)
    if (state := run.restore()) is not None:
        trainer.restore(state)
    trainer.fit()


TASK = PlainTask(Config, train, objective="loss", direction="minimize")
