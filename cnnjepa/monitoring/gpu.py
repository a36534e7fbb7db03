"""Energy and utilisation of a GPU, from the counters of its driver (NVML)."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch


def _counter(device: torch.device, ask: Callable[[Any, Any], float]) -> Callable[[], float] | None:
    """Return a function that gives `ask(pynvml, handle of device)`; None where NVML does not answer.

    Once it has answered, a failed reading repeats the last one: no counter may stop a run.
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
    """Return a function that reads how busy `device` was, in [0, 1]; None for a part of a MIG device."""
    return _counter(device, lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100)


def nvml_joules(device: torch.device) -> Callable[[], float] | None:
    """Return a function that reads the energy counter of `device` in joules; None before Volta."""
    return _counter(device, lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000)


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
        self.recorded = [0.0, 0.0]  # the sum of what it has recorded, and how often: what a checkpoint keeps

    def look(self) -> dict[str, float]:
        """{"gpu_utilisation": now}, which counts; {} where the device does not tell."""
        if self._read is None:
            return {}
        now = self._read()
        self.recorded = [self.recorded[0] + now, self.recorded[1] + 1]
        return {"gpu_utilisation": now}

    @property
    def mean(self) -> float | None:
        """In [0, 1]."""
        return self.recorded[0] / self.recorded[1] if self.recorded[1] else None
