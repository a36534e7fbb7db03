"""The optimisers (paper, section IV-A): AdamW, and LARS for the joint-embedding baselines."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from cnnjepa.config import OptimizerConfig, OptimizerName


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose step for each decayed weight w is scaled by trust x |w| / (|g| + decay x |w|) (You et al. 2017).

    A group of weight decay 0 gets no such scale: its parameters are plain SGD's.
    """

    def __init__(self, parameters: Any, lr: float, momentum: float, weight_decay: float, trust_coefficient: float) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there, which it overwrites; `closure` must be None."""
        assert closure is None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            # In place: a head of 151 M weights would otherwise be copied twice a step. The gradients are of no use afterwards.
            updates: list[torch.Tensor] = [p.grad for p in weights]
            if decay := group["weight_decay"]:
                scales = [
                    # A weight or gradient of 0 tells nothing about a good size of step.
                    torch.where((w > 0) & (g > 0), group["trust_coefficient"] * w / (g + decay * w), torch.ones_like(w))
                    for w, g in zip(torch._foreach_norm(weights), torch._foreach_norm(updates), strict=True)
                ]
                torch._foreach_add_(updates, weights, alpha=decay)
                torch._foreach_mul_(updates, scales)
            for p in weights:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in weights]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(weights, buffers, alpha=-group["lr"])


class AdamW(torch.optim.AdamW):
    """Torch's AdamW, of the same steps, that does not load torch's compiler: a second of each start of a process, of no use to a run.

    Torch's optimisers load it to be hidden from it. Should another version of torch do so elsewhere, the second is spent again.
    """

    _step = inspect.unwrap(torch.optim.AdamW.step)

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
            plain = inspect.unwrap(getattr(torch.optim.Optimizer, name))
            vars(plain).setdefault("__dynamo_disable", plain)  # what it would make of the method, which is asked for first
        super().__init__(*arguments, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there; `closure` must be None."""
        assert closure is None
        AdamW._step(self)


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser over all `parameters`; the trainer sets learning rate and weight decay of each step.

    What is not decayed where decay_norms_and_biases is off is told by its shape and not by its name: scales and shifts of norms, biases and
    layer scales have at most one dimension, and nothing else has.
    """
    groups: list[dict[str, Any]] = [{"params": list(parameters)}]
    if not config.decay_norms_and_biases:
        every = groups[0]["params"]
        groups = [{"params": [p for p in every if p.ndim > 1]}, {"params": [p for p in every if p.ndim <= 1], "weight_decay": 0.0}]
    if config.name is OptimizerName.lars:
        return Lars(groups, config.lr, config.momentum, config.weight_decay, config.trust_coefficient)
    betas = (config.beta1, config.beta2)
    return AdamW(groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Give every parameter group that is decayed at all the decay `weight_decay`."""
    for group in optimizer.param_groups:
        if group["weight_decay"]:
            group["weight_decay"] = weight_decay
