"""Measure the peak memory of a run."""

import contextlib
import re
import resource
from pathlib import Path

import torch

from cnnjepa.run.ranks import Ranks

_PEAK_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset_peak_memory() -> None:
    """Reset the peak of earlier runs in this process; on systems that cannot, the peak remains."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        _PEAK_RESET.write_text("5")


def peak_memory_mb(ranks: Ranks) -> float:
    """Return the peak memory in MiB: of the device on CUDA, resident in this process on CPU."""
    if ranks.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    found = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text()) if _STATUS.exists() else None
    return int(found[1]) / 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
