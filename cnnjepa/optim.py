"""The optimiser (paper, section IV-A)."""

from collections.abc import Iterable

import torch
from torch import nn

from cnnjepa.config import OptimizerConfig


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW over all `parameters`, decayed alike; the trainer sets the learning rate of each step."""
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
