"""Coordinate the ranks of torchrun's variables, or one alone; import torch only when needed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# Long enough for rank 0 to write a large checkpoint or fit a probe while the others wait.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


class Device(Enum):
    """Device to train on; auto takes a CUDA device if there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    count: int
    device: "torch.device"

    @property
    def is_main(self) -> bool:
        """Return whether this is the one rank that writes files."""
        return self.rank == 0


def rank_count() -> int:
    """Return the number of ranks that the launcher started; 1 without a launcher."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdigit() or size == "0":
        raise ValueError(f"WORLD_SIZE must be the number of ranks; got {size}")
    return int(size)


def is_main_rank() -> bool:
    """Return whether the launcher made this process the one that writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def pick_device(wish: Device) -> "torch.device":
    """Return this rank's device; raise ValueError if CUDA is requested but unavailable."""
    import torch

    if wish is Device.cpu or (wish is Device.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device must be cpu or auto where torch sees no CUDA device; got cuda")
    # A launcher that gives each rank a single visible device leaves only index 0.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def joined(wish: Device) -> Iterator[Ranks]:
    """Join the process group within the block: NCCL on CUDA, gloo on CPU.

    A single rank joins nothing. A nested block leaves the existing process group open.
    """
    import torch
    import torch.distributed as dist

    device = pick_device(wish)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank_count() == 1:
        yield Ranks(0, 1, device)
        return
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def broadcast_object(value: T, ranks: Ranks) -> T:
    """Return rank 0's `value` on every rank."""
    if ranks.count == 1:
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0, device=ranks.device)
    return box[0]


def gathered(value: T, ranks: Ranks) -> list[T]:
    """Return the values of all ranks in rank order, on every rank."""
    if ranks.count == 1:
        return [value]
    import torch.distributed as dist

    values = [value] * ranks.count
    dist.all_gather_object(values, value)
    return values


def first_of(text: str, ranks: Ranks) -> str:
    """Return the text of the lowest rank with a non-empty text, on every rank; "" if none."""
    return next((t for t in gathered(text, ranks) if t), "")
