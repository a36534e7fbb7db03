"""BatchNorm over the rows with content, of tiles some of which have none: how many have, only the device knows.

Rows without content hold zeros. They add nothing to a sum, so the statistics of all rows are
corrected for their number. All is queued without waiting for the count, as a CUDA graph needs it.

Shapes: M rows of C channels, of which the first `count` have content.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

aten = torch.ops.aten


def flat(x_MC: Tensor) -> Tensor:
    """View [M, C] as [1, C, M, 1]: with other strides ATen's BatchNorm is not vectorised."""
    return x_MC[None, :, None].permute(0, 3, 1, 2)


def _rows(x_1CM1: Tensor) -> Tensor:
    """Invert `flat`."""
    return x_1CM1.permute(0, 2, 3, 1).flatten(0, 2)


def _moments(z_MC: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of all rows, each [C]."""
    if z_MC.is_cuda:
        mean, inverse_std = torch.batch_norm_stats(flat(z_MC), norm.eps)
    else:
        _, mean, inverse_std = aten.native_batch_norm(flat(z_MC), norm.weight, norm.bias, None, None, True, 0.0, norm.eps)
    return mean, inverse_std.pow(-2) - norm.eps


def forward(z_MC: Tensor, norm: nn.BatchNorm2d, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Apply BatchNorm in training; return values, mean and 1 / std. Rows without content get a value, too.

    The running statistics move as by nn.BatchNorm2d over the rows with content.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    mean, variance = _moments(z_MC, norm)
    share = len(z_MC) / count
    variance = (share * (variance - (share - 1) * mean.square())).clamp_min(0)
    mean = share * mean
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_((variance * count / (count - 1)).to(norm.running_var.dtype), norm.momentum)
    y = F.batch_norm(flat(z_MC), mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)
    return _rows(y), mean, (variance + norm.eps).rsqrt()


def backward(g_MC: Tensor, z_MC: Tensor, w: Tensor, mean: Tensor, inverse_std: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight and bias; `g_MC` must be zero in rows without content.

    Rows without content get a gradient, which the caller has to clear.
    """
    if z_MC.is_cuda:
        g, z = flat(g_MC), flat(z_MC)
        sum_g, sum_gz, to_w, to_b = torch.batch_norm_backward_reduce(g, z, mean, inverse_std, w, True, True, True)
        to_z = torch.batch_norm_backward_elemt(g, z, mean, inverse_std, w, sum_g, sum_gz, count.to(torch.int32).view(1))
        return _rows(to_z), to_w, to_b
    normal = (z_MC - mean) * inverse_std
    to_w, to_b = (g_MC * normal).sum(0), g_MC.sum(0, dtype=w.dtype)
    return ((g_MC - (to_b + normal * to_w) / count) * (inverse_std * w)).to(z_MC.dtype), to_w.to(w.dtype), to_b


def apply(z_MC: Tensor, norm: nn.BatchNorm2d, count: Tensor, clear: Callable[[Tensor], Tensor]) -> Tensor:
    """Return BatchNorm of the rows, with gradient; `clear` sets rows without content to zero, in place."""
    out: Tensor = _CountedNorm.apply(z_MC, norm.weight, norm.bias, norm, count, clear)
    return out


class _CountedNorm(torch.autograd.Function):
    """`forward` and `backward` as one op."""

    @staticmethod
    def forward(
        ctx: Any, z_MC: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, count: Tensor, clear: Callable[[Tensor], Tensor]
    ) -> Tensor:
        y_MC, mean, inverse_std = forward(z_MC, norm, count)
        ctx.save_for_backward(z_MC, weight, mean, inverse_std, count)
        ctx.clear = clear
        return clear(y_MC)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_MC: Tensor) -> tuple[Any, ...]:
        z_MC, weight, mean, inverse_std, count = ctx.saved_tensors
        to_z, to_w, to_b = backward(ctx.clear(g_MC.clone()), z_MC, weight, mean, inverse_std, count)
        return ctx.clear(to_z), to_w, to_b, None, None, None
