"""Read the energy and utilisation of a GPU from its driver's counters (NVML)."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch


def _counter(device: torch.device, ask: Callable[[Any, Any], float]) -> Callable[[], float] | None:
    """Return a function that reads a counter of `device`, or None if NVML does not answer.

    Later failures repeat the last reading: no counter may stop a run.
    """
    if device.type != "cuda":
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        # By UUID, not by index: CUDA_VISIBLE_DEVICES renumbers the devices, and NVML ignores it.
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        last = ask(pynvml, handle)
    except pynvml.NVMLError:  # no driver, an old one, or no such counter
        return None

    def read() -> float:
        nonlocal last
        with contextlib.suppress(pynvml.NVMLError):
            last = ask(pynvml, handle)
        return last

    return read


def nvml_utilisation(device: torch.device) -> Callable[[], float] | None:
    """Return a function that reads the utilisation of `device` in [0, 1]; None for MIG parts."""
    return _counter(device, lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100)


def nvml_joules(device: torch.device) -> Callable[[], float] | None:
    """Return a function that reads the energy counter of `device` in joules; None before Volta."""
    return _counter(device, lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000)


class EnergyMeter:
    """Joules that this rank's device drew over all resumes, or None if any part is unknown."""

    def __init__(self, read: Callable[[], float] | None) -> None:
        self._read = read
        self._started = read() if read is not None else 0.0
        self._earlier: float | None = 0.0

    def resume(self, joules: float | None) -> None:
        """Continue from the joules of a checkpoint."""
        self._earlier = joules

    @property
    def joules(self) -> float | None:
        """Return the joules so far, including those of other processes on the device."""
        if self._read is None or self._earlier is None:
            return None
        return self._earlier + self._read() - self._started


class BusyMeter:
    """Mean utilisation of this rank's device at logged steps, over all resumes."""

    def __init__(self, read: Callable[[], float] | None) -> None:
        self._read = read
        self.recorded = [0.0, 0.0]  # sum and number of readings, as checkpoints keep them

    def look(self) -> dict[str, float]:
        """Return {"gpu_utilisation": now} and count it, or {} if it is not reported."""
        if self._read is None:
            return {}
        now = self._read()
        self.recorded = [self.recorded[0] + now, self.recorded[1] + 1]
        return {"gpu_utilisation": now}

    @property
    def mean(self) -> float | None:
        """Return the mean in [0, 1], or None without readings."""
        return self.recorded[0] / self.recorded[1] if self.recorded[1] else None
