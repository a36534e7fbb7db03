"""Optimise with AdamW, LARS for the joint-embedding baselines (paper, section IV-A), or LAMB for SparK."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from cnnjepa.config import OptimizerConfig, OptimizerName


def _with_gradients(groups: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[torch.Tensor], list[torch.Tensor]]]:
    """Yield each group that has gradients, with the weights that have one, and these gradients."""
    for group in groups:
        if weights := [p for p in group["params"] if p.grad is not None]:
            yield group, weights, [p.grad for p in weights]


class Lars(torch.optim.Optimizer):
    """LARS: momentum SGD with a scaled step for each decayed weight (You et al. 2017).

    The scale of weight w with gradient g is trust x |w| / (|g| + decay x |w|). Groups without
    weight decay are not scaled.
    """

    def __init__(self, parameters: Any, lr: float, momentum: float, weight_decay: float, trust_coefficient: float) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step and overwrite the gradients; `closure` must be None."""
        assert closure is None
        # In place, since gradients are not needed afterwards: a head can have 151 M weights.
        for group, weights, updates in _with_gradients(self.param_groups):
            if decay := group["weight_decay"]:
                scales = [
                    # A weight or gradient of 0 says nothing about a good step size.
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


class Lamb(torch.optim.Optimizer):
    """LAMB: Adam with a scaled step for each decayed weight (You et al. 2020, arXiv 1904.00962).

    The step of weight w is Adam's plus decay x w, scaled to the length of w. Groups without weight
    decay are not scaled.
    """

    def __init__(self, parameters: Any, lr: float, betas: tuple[float, float], weight_decay: float, eps: float = 1e-6) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps, "steps": 0}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; `closure` must be None."""
        assert closure is None
        for group, weights, gradients in _with_gradients(self.param_groups):
            for p in weights:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            means, squares = ([self.state[p][key] for p in weights] for key in ("exp_avg", "exp_avg_sq"))
            beta1, beta2 = group["betas"]
            group["steps"] += 1
            torch._foreach_lerp_(means, gradients, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
            roots = torch._foreach_sqrt(squares)
            torch._foreach_div_(roots, (1 - beta2 ** group["steps"]) ** 0.5)
            torch._foreach_add_(roots, group["eps"])
            updates = torch._foreach_div(means, roots)
            torch._foreach_div_(updates, 1 - beta1 ** group["steps"])
            if decay := group["weight_decay"]:
                torch._foreach_add_(updates, weights, alpha=decay)
                scales = [
                    # A weight of 0 says nothing about a good step size.
                    torch.where((w > 0) & (u > 0), w / u, torch.ones_like(w))
                    for w, u in zip(torch._foreach_norm(weights), torch._foreach_norm(updates), strict=True)
                ]
                torch._foreach_mul_(updates, scales)
            torch._foreach_add_(weights, updates, alpha=-group["lr"])


class AdamW(torch.optim.AdamW):
    """torch's AdamW without loading torch's compiler, which takes a second per process start.

    torch's optimisers load it only to disable it for their own methods.
    """

    _step = inspect.unwrap(torch.optim.AdamW.step)

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
            plain = inspect.unwrap(getattr(torch.optim.Optimizer, name))
            # torch looks up the disabled version here before it builds one
            vars(plain).setdefault("__dynamo_disable", plain)
        super().__init__(*arguments, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; `closure` must be None."""
        assert closure is None
        AdamW._step(self)


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser. The trainer sets the learning rate and weight decay of each step.

    Without decay_norms_and_biases, parameters of at most one dimension are not decayed: scales and
    shifts of norms, biases and layer scales.
    """
    groups: list[dict[str, Any]] = [{"params": list(parameters)}]
    if not config.decay_norms_and_biases:
        every = groups[0]["params"]
        groups = [{"params": [p for p in every if p.ndim > 1]}, {"params": [p for p in every if p.ndim <= 1], "weight_decay": 0.0}]
    if config.name is OptimizerName.lars:
        return Lars(groups, config.lr, config.momentum, config.weight_decay, config.trust_coefficient)
    betas = (config.beta1, config.beta2)
    if config.name is OptimizerName.lamb:
        return Lamb(groups, config.lr, betas, config.weight_decay)
    return AdamW(groups, lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group to `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Set the weight decay of every decayed parameter group to `weight_decay`."""
    for group in optimizer.param_groups:
        if group["weight_decay"]:
            group["weight_decay"] = weight_decay
