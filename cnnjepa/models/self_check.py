"""Compare a faster pass of a network with the plain one, on the device and with the batch at hand, before it is used."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def unmoved(net: nn.Module) -> Iterator[None]:
    """Give the buffers of `net`, such as running statistics, their values back in the end."""
    before = [b.clone() for b in net.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(net.buffers(), before, strict=True):
            buffer.copy_(value)


def outcome(run: Callable[..., Tensor], net: nn.Module, given: Sequence[Tensor]) -> list[Tensor]:
    """Return what a pass of `net` computes, which is left as it was: output, gradients if any are asked for, buffers.

    The gradients are those of a fixed upstream gradient, for all parameters of `net`, and for the
    inputs that require one.
    """
    given = [t.detach().requires_grad_(t.requires_grad and torch.is_grad_enabled()) for t in given]
    with unmoved(net):
        out = run(*given)
        gradients: Sequence[Tensor] = ()
        if out.requires_grad:
            upstream = torch.cos(torch.arange(out.numel(), device=out.device, dtype=out.dtype)).view(out.shape)
            wanted = [p for p in [*net.parameters(), *given] if p.requires_grad]
            gradients = torch.autograd.grad(out, wanted, upstream)
        return [t.detach().clone() for t in (out, *gradients, *net.buffers())]


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference over the largest value of its tensor; NaN where a number is not finite."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return float(torch.stack([(a - b).abs().max() / b.abs().max().clamp_min(1e-12) for a, b in pairs]).max())


def norm_of_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest norm of a difference over the norm of its tensor; NaN where a number is not finite.

    Rounding moves some values across a ReLU's edge, each by all it has, so that the largest
    difference says little about low precision.
    """
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    return float(torch.stack([(a - b).norm() / b.norm().clamp_min(1e-12) for a, b in pairs]).max())
