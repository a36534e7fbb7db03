"""A network that knows no mask, run under one: every operation on a map is torch's own on the whole map, times the mask.

Written from what docs/guides/visible.md says and with nothing of cnnjepa/: maps keep their zeros, BatchNorm, GroupNorm and
means over an image see visible positions alone. Slow, and for networks that torch's functions run as they are.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Masked(TorchFunctionMode):
    """While active, every map has zeros at hidden positions. A map has rows and columns in proportion to the mask's."""

    def __init__(self, visible_Bhw: Tensor) -> None:
        super().__init__()
        self.visible = visible_Bhw

    def mask(self, x: Tensor, rows: int) -> Tensor | None:
        """The mask at the size of x, whose rows are in dimension `rows`; None if x is no map."""
        b, h, w = self.visible.shape
        height, width = x.shape[rows], x.shape[rows + 1]
        if len(x) != b or height % h or width % w or height // h != width // w:
            return None
        times = height // h
        whole = self.visible.repeat_interleave(times, 1).repeat_interleave(times, 2)
        return whole[:, None] if rows == 2 else whole[..., None]

    def hidden(self, x: Any) -> Any:
        """The same with zeros where hidden."""
        if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
            return x
        masks = [mask for rows in (2, 1) if (mask := self.mask(x, rows)) is not None]
        assert len(masks) < 2, f"rows and columns may be in two places in {tuple(x.shape)}: take another size"
        return torch.where(masks[0], x, 0) if masks else x

    def batch_norm(self, x: Tensor, mean: Any, var: Any, w: Any, b: Any, training: bool, momentum: float, eps: float) -> Tensor:
        seen = self.mask(x, 2)
        assert seen is not None
        if training:
            values = x.movedim(1, -1)[seen[:, 0]]  # [positions, C]
            n = len(values)
            found_mean = values.mean(0)
            found_var = (values - found_mean).square().mean(0)
            if mean is not None:
                mean.copy_((1 - momentum) * mean + momentum * found_mean.detach())
                var.copy_((1 - momentum) * var + momentum * found_var.detach() * n / (n - 1))
            mean, var = found_mean, found_var

        def by_channel(v: Tensor) -> Tensor:
            return v[:, None, None]

        y = (x - by_channel(mean)) / by_channel(var + eps).sqrt()
        return torch.where(seen, y * by_channel(w) + by_channel(b), 0)

    def group_norm(self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        seen = self.mask(x, 2)
        assert seen is not None
        out = []
        for image, where in zip(x, seen[:, 0], strict=True):
            parts = []
            for of in image.chunk(groups):
                count = of[:, where].numel() or 1
                mean = torch.where(where, of, 0).sum() / count
                var = torch.where(where, of - mean, 0).square().sum() / count
                parts.append((of - mean) / (var + eps).sqrt())
            y = torch.cat(parts)
            out.append(torch.where(where, y * weight[:, None, None] + bias[:, None, None], 0))
        return torch.stack(out)

    def mean(self, x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
        dims = sorted(d % x.ndim for d in dim)
        mask = self.mask(x, dims[0])
        assert mask is not None
        return torch.where(mask, x, 0).sum(dims, keepdim=keepdim) / mask.sum(dims, keepdim=keepdim).clamp_min(1)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, first = getattr(func, "__name__", ""), args[0] if args else None
        if isinstance(first, Tensor) and first.ndim == 4 and self.mask(first, 2) is not None:
            if name == "batch_norm":
                given = dict(zip(("x", "mean", "var", "w", "b", "training", "momentum", "eps"), args, strict=False))
                names = {"running_mean": "mean", "running_var": "var", "weight": "w", "bias": "b"}
                return self.batch_norm(**(given | {names.get(key, key): value for key, value in kwargs.items()}))
            if name == "group_norm":
                return self.group_norm(*args, **kwargs)
        if name == "mean" and isinstance(first, Tensor) and first.ndim == 4 and len(args) + len(kwargs) > 1:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if isinstance(dim, tuple | list) and self.mask(first, sorted(d % 4 for d in dim)[0]) is not None:
                return self.mean(*args, **kwargs)
        if func is F.adaptive_avg_pool2d:
            return self.mean(first, (2, 3), True)
        return self.hidden(func(*args, **kwargs))
