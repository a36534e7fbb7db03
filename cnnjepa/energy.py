"""What a GPU has drawn, as it tells itself: NVML's counter, without a package for it."""

import ctypes
from collections.abc import Callable

import torch


def nvml_joules(device: torch.device) -> Callable[[], float] | None:
    """A function that reads the energy counter of `device` in joules; None where the device or its driver has none (before Volta)."""
    if device.type != "cuda":
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        # By its own name and not by its number: CUDA_VISIBLE_DEVICES counts anew, NVML does not.
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
            return None
        if nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            return None
    except (OSError, AttributeError):  # no driver's library, or one that lacks the call
        return None

    def read() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return millijoules.value / 1000

    return read


class EnergyMeter:
    """Joules that this rank's device has drawn for the run, over all resumes; None where any part of them is unknown."""

    def __init__(self, read: Callable[[], float] | None) -> None:
        self._read = read
        self._started = read() if read is not None else 0.0
        self._earlier: float | None = 0.0

    def resume(self, joules: float | None) -> None:
        """Go on from what a checkpoint tells."""
        self._earlier = joules

    @property
    def joules(self) -> float | None:
        """So far; a device that others share counts their part too."""
        if self._read is None or self._earlier is None:
            return None
        return self._earlier + self._read() - self._started
