"""Update the target encoder as an EMA of the context encoder (paper, section III-A)."""

import copy
from typing import TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def target_of(online: Net) -> Net:
    """Return a copy of `online` without gradients and with its own BatchNorm buffers."""
    target = copy.deepcopy(online)
    return target.requires_grad_(False)


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Set target <- momentum x target + (1 - momentum) x online for parameters, not buffers."""
    torch._foreach_lerp_(list(target.parameters()), [p.detach() for p in online.parameters()], 1 - momentum)
