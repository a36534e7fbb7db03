"""Exchange gradients, statistics and rows between ranks; cnnjepa/run/ranks.py joins them.

Gradients are averaged in buckets that are sent during the backward pass, as in
DistributedDataParallel with a static graph. DistributedDataParallel rearranges its buckets after
the first step: a resumed run would add in another order and differ in the last bit. The last
message carries the loss and the requests to stop, so that all ranks act on the same step.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from cnnjepa.run.ranks import Ranks


@dataclass
class _Bucket:
    """Parameters whose gradients travel in one message."""

    parameters: list[nn.Parameter]
    missing: int = 0  # gradients that the backward pass has yet to complete
    message: Tensor | None = None
    work: Any = None


class GradientBuckets:
    """Averages gradients over ranks, with the same messages in the same order at every step.

    Every backward pass must give every parameter a gradient. All ranks have the same parameters.
    """

    def __init__(self, parameters: list[nn.Parameter], ranks: Ranks, megabytes: float = 25.0) -> None:
        """Fill buckets of about `megabytes` MiB from the last parameter to the first.

        Layers that are used last complete their gradients first.
        """
        self._ranks, self._armed, self._next = ranks, False, 0
        self._buckets: list[_Bucket] = []
        size = float("inf")
        for parameter in reversed(parameters) if ranks.count > 1 else ():
            if size >= megabytes * 2**20:
                self._buckets.append(_Bucket([]))
                size = 0
            self._buckets[-1].parameters.append(parameter)
            size += parameter.numel() * parameter.element_size()
            parameter.register_post_accumulate_grad_hook(partial(self._completed, self._buckets[-1]))

    def arm(self) -> None:
        """Mark the next backward pass as the step's last, so that complete buckets may be sent."""
        self._armed, self._next = True, 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    def _completed(self, bucket: _Bucket, _parameter: Tensor) -> None:
        if not self._armed:
            return
        bucket.missing -= 1
        # In bucket order, not in order of completion: all ranks must send the same message.
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            bucket = self._buckets[self._next]
            bucket.message = torch.cat([p.grad.flatten() for p in bucket.parameters if p.grad is not None])
            bucket.work = dist.all_reduce(bucket.message, async_op=True)
            self._next += 1

    def finish(self, scalars: Tensor) -> Tensor:
        """Wait until each gradient is its mean over ranks; return the mean of the 1-d `scalars`."""
        self._armed = False
        if self._ranks.count == 1:
            return scalars
        assert self._next == len(self._buckets), "a parameter has no gradient, or backward ran without `arm`"
        last = dist.all_reduce(scalars, async_op=True)
        for bucket in self._buckets:
            assert bucket.message is not None
            bucket.work.wait()
            bucket.message /= self._ranks.count
            for parameter, mean in zip(bucket.parameters, bucket.message.split([p.numel() for p in bucket.parameters]), strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(mean.view(parameter.grad.shape))
            bucket.message = bucket.work = None
        last.wait()
        return scalars / self._ranks.count


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_batch(x_BD: Tensor) -> Tensor:
    """Concatenate the rows of all ranks in rank order, [R x B, D], with gradient.

    Each rank must hold the same number of rows. A loss over the gathered rows is the same on every
    rank, and each row receives R times its gradient. The mean over ranks that `GradientBuckets`
    takes is then the gradient of that one loss.
    """
    if world_size() == 1:
        return x_BD
    rank, ranks, rows = dist.get_rank(), world_size(), len(x_BD)
    return all_reduce(F.pad(x_BD, (0, 0, rank * rows, (ranks - 1 - rank) * rows)))


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of `x` over ranks, with gradient.

    As with `gather_batch`, a loss of the result is the same on every rank, what the result was made
    from receives R times its share of the gradient, and `GradientBuckets` takes the mean.
    """
    return x if world_size() == 1 else all_reduce(x) / world_size()


def tensor(buffer: Tensor | None) -> Tensor:
    """Return a BatchNorm buffer that is known to exist."""
    assert buffer is not None
    return buffer


class RunningStatistics:
    """Combines BatchNorm's running statistics over ranks after each step.

    The result equals that of one rank that processes the micro-batches of the global batch in
    order. In one step, a rank makes a passes and folds each into r -> (1-m) r + m s. Folds chain:
    with d = (1-m)^a, R ranks that start from r0 and end at r_k combine to d^R r0 + sum over k of
    d^(R-1-k) (r_k - d r0). With synchronised BatchNorm, nothing is sent.
    """

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        """Track all BatchNorms of `module` except synchronised ones.

        Each must make the same number of passes in every step.
        """
        self._ranks = ranks
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and not getattr(m, "sync", False)]
        self._means_vars: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._keep: list[float] = []  # share of the old statistics that one pass keeps
        for norm in norms if ranks.count > 1 else []:
            assert norm.momentum is not None
            self._means_vars += [tensor(norm.running_mean), tensor(norm.running_var)]
            self._counts.append(tensor(norm.num_batches_tracked))
            self._keep.append(1 - norm.momentum)
        self._before: Tensor | None = None
        self._counts_before: Tensor | None = None
        self._decay: Tensor | None = None  # per number, for one rank's step

    def start_step(self) -> None:
        """Remember the statistics at the start of the step."""
        if self._counts:
            self._before, self._counts_before = torch.cat(self._means_vars), torch.stack(self._counts)

    def end_step(self) -> None:
        """Combine what the ranks have folded since `start_step`."""
        if not self._counts:
            return
        assert self._before is not None
        assert self._counts_before is not None
        ranks, passes = self._ranks, torch.stack(self._counts) - self._counts_before
        if self._decay is None:
            sizes = [2 * b.numel() for b in self._means_vars[::2]]
            step_keeps = [keep**n for keep, n in zip(self._keep, passes.tolist(), strict=True)]
            self._decay = torch.cat([self._before.new_full((n,), keep) for n, keep in zip(sizes, step_keeps, strict=True)])
        part = (torch.cat(self._means_vars) - self._decay * self._before) * self._decay ** (ranks.count - 1 - ranks.rank)
        dist.all_reduce(part)
        combined = self._decay**ranks.count * self._before + part
        for buffer, value in zip(self._means_vars, combined.split([b.numel() for b in self._means_vars]), strict=True):
            buffer.copy_(value)
        for count, n in zip(self._counts, passes, strict=True):
            count += n * (ranks.count - 1)


def gather_rows(rows: Tensor, ranks: Ranks) -> Tensor:
    """Return the rows of all ranks in rank order on rank 0, and no rows on the others."""
    if ranks.count == 1:
        return rows
    counts: list[int] = [0] * ranks.count
    dist.all_gather_object(counts, len(rows))
    if not ranks.is_main:
        if len(rows):
            dist.send(rows.contiguous(), dst=0)
        return rows[:0]
    gathered = rows.new_empty(sum(counts), *rows.shape[1:])
    parts = gathered.split(counts)
    parts[0].copy_(rows)
    for rank, part in enumerate(parts[1:], start=1):
        if len(part):
            dist.recv(part, src=rank)
    return gathered
