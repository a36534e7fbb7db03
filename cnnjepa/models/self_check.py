"""Compare a faster pass of a network with the plain one, on the device and with the batch at hand, before it is used."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Outcome(NamedTuple):
    """Copies of what a pass computes."""

    output: Tensor
    gradients: list[Tensor]  # none if none are asked for
    buffers: list[Tensor]  # as the pass leaves them

    @property
    def tensors(self) -> list[Tensor]:
        """Return all of it."""
        return [self.output, *self.gradients, *self.buffers]


@contextmanager
def unmoved(net: nn.Module) -> Iterator[None]:
    """Give the buffers of `net`, such as running statistics, their values back in the end."""
    before = [b.clone() for b in net.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(net.buffers(), before, strict=True):
            buffer.copy_(value)


def outcome(run: Callable[..., Tensor], net: nn.Module, given: Sequence[Tensor]) -> Outcome:
    """Return what a pass of `net` computes, which is left as it was.

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
        return Outcome(out.detach().clone(), [g.clone() for g in gradients], [b.clone() for b in net.buffers()])


def same_bits(found: Outcome, expected: Outcome) -> bool:
    """Return whether all numbers are equal."""
    return all(torch.equal(a, b) for a, b in zip(found.tensors, expected.tensors, strict=True))


def largest_difference(found: Outcome, expected: Outcome) -> float:
    """Return the largest difference over the largest value of its tensor; NaN where a number is not finite."""
    pairs = [(a.double(), b.double()) for a, b in zip(found.tensors, expected.tensors, strict=True)]
    return float(torch.stack([(a - b).abs().max() / b.abs().max().clamp_min(1e-12) for a, b in pairs]).max())


def norm_of_difference(found: Outcome, expected: Outcome) -> float:
    """Return the largest norm of a difference over the norm of what it is of; NaN where a number is not finite.

    It is of the output, of each buffer, and of all gradients together: that of a bias before a
    BatchNorm is nothing but rounding. Norms, since rounding moves some values across a ReLU's edge,
    each by all it has.
    """
    parts = [([found.output], [expected.output]), (found.gradients, expected.gradients)]
    parts += [([a], [b]) for a, b in zip(found.buffers, expected.buffers, strict=True)]
    apart = [_norm([x.double() - y.double() for x, y in zip(a, b, strict=True)]) / max(_norm(b), 1e-12) for a, b in parts]
    return float(torch.tensor(apart).max())  # unlike max(), NaN if any is


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in tensors)) ** 0.5
