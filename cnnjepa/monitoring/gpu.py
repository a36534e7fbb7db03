"""What a GPU has drawn and how busy it was, as it tells itself: NVML's counters, without a package for it."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch


class _Rates(ctypes.Structure):
    """NVML's nvmlUtilization_t: percent of the last moment in which a kernel ran, and in which memory was read or written."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


def _nvml(device: torch.device) -> tuple[Any, ctypes.c_void_p] | None:
    """The driver's library and its handle of `device`; None where there is none."""
    if device.type != "cuda":
        return None
    try:
        nvml, handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        # By its own name and not by its number: CUDA_VISIBLE_DEVICES counts anew, NVML does not.
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
            return None
    except (OSError, AttributeError):  # no driver's library, or one that lacks the call
        return None
    return nvml, handle


def nvml_utilisation(device: torch.device) -> Callable[[], float] | None:
    """A function that reads the share of the last moment in which `device` was busy, in [0, 1]; None where it does not tell."""
    found, rates = _nvml(device), _Rates()
    try:
        if found is None or found[0].nvmlDeviceGetUtilizationRates(found[1], ctypes.byref(rates)):  # a part of a MIG device has none
            return None
    except AttributeError:
        return None
    nvml, handle = found

    def read() -> float:
        nvml.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(rates))
        return float(rates.gpu) / 100

    return read


def nvml_joules(device: torch.device) -> Callable[[], float] | None:
    """A function that reads the energy counter of `device` in joules; None where the device or its driver has none (before Volta)."""
    found, millijoules = _nvml(device), ctypes.c_ulonglong()
    try:
        if found is None or found[0].nvmlDeviceGetTotalEnergyConsumption(found[1], ctypes.byref(millijoules)):
            return None
    except AttributeError:
        return None
    nvml, handle = found

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


class BusyMeter:
    """How busy this rank's device was at the steps that are logged, on average over all resumes; None where it does not tell."""

    def __init__(self, read: Callable[[], float] | None) -> None:
        self._read = read
        self.told = [0.0, 0.0]  # the sum of what it has told, and how often: what a checkpoint keeps

    def look(self) -> dict[str, float]:
        """{"gpu_utilisation": now}, which counts; {} where the device does not tell."""
        if self._read is None:
            return {}
        now = self._read()
        self.told = [self.told[0] + now, self.told[1] + 1]
        return {"gpu_utilisation": now}

    @property
    def mean(self) -> float | None:
        """In [0, 1]."""
        return self.told[0] / self.told[1] if self.told[1] else None
