"""Learn features without labels from a teacher that follows the student; every draw depends on the seed and the step alone."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from jobs.plain import PlainTask


@dataclass
class Config:
    lr: float = 0.003
    epochs: int = 6
    seed: int = 11


def encoder():
    return nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 6))


class Learner(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher, self.head = encoder(), encoder(), nn.Linear(6, 6)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.register_buffer("centre", torch.zeros(6))

    def forward(self, one, other):
        with torch.no_grad():
            wanted = self.teacher(other)
        given = self.head(self.student(one))
        loss = (given - (wanted - self.centre).tanh()).square().mean()
        self.centre.mul_(0.9).add_(wanted.mean(0), alpha=0.1)
        return loss

    @torch.no_grad()
    def follow(self, momentum):
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters()):
            slow.lerp_(fast, 1 - momentum)


def train(config, run):
    torch.manual_seed(config.seed)
    images = torch.randn(128, 10, generator=torch.Generator().manual_seed(0))
    learner = Learner()
    trained = [p for p in learner.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.lr)
    total, begun = config.epochs * 4, 0
    found = run.restore()
    if found is not None:
        learner.load_state_dict(found["learner"])
        optimizer.load_state_dict(found["optimizer"])
        begun = found["step"]
    for step in range(begun, total):
        draw = torch.Generator().manual_seed(config.seed * 10_000 + step)
        batch = images[torch.randperm(128, generator=draw)[:32]]
        one, other = (batch + 0.1 * torch.randn(32, 10, generator=draw) for _ in range(2))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 + math.cos(math.pi * step / total)) / 2
        loss = learner(one, other)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.follow(0.95)
        if (step + 1) % 4 == 0:
            epoch = (step + 1) // 4
            run.report(epoch, loss=loss.item())
            run.save({"step": step + 1, "learner": learner.state_dict(), "optimizer": optimizer.state_dict()})
            if run.should_stop:
                return


TASK = PlainTask(Config, train, objective="loss", direction="minimize")
