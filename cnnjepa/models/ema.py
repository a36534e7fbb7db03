"""The target encoder's weights: an exponential moving average of the context encoder's (paper, section III-A)."""

import copy
from typing import TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def target_of(online: Net) -> Net:
    """A copy of `online` that no gradient reaches; its BatchNorm buffers are its own from here on."""
    target = copy.deepcopy(online)
    return target.requires_grad_(False)


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """target <- momentum x target + (1 - momentum) x online, for parameters and never for buffers."""
    torch._foreach_lerp_(list(target.parameters()), [p.detach() for p in online.parameters()], 1 - momentum)
