import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cnnjepa.monitoring.gpu import BusyMeter, EnergyMeter, nvml_joules, nvml_utilisation


def test_a_processor_tells_nothing() -> None:
    assert nvml_joules(torch.device("cpu")) is None
    assert EnergyMeter(None).joules is None
    assert nvml_utilisation(torch.device("cpu")) is None
    assert BusyMeter(None).look() == {}
    assert BusyMeter(None).mean is None


def test_energy_adds_up_over_resumes_and_a_part_that_is_unknown_makes_the_whole_unknown() -> None:
    counter = iter([1000.0, 1250.0, 7000.0, 7100.0, 9000.0])
    first = EnergyMeter(lambda: next(counter))
    told = first.joules
    assert told == 250
    second = EnergyMeter(lambda: next(counter))
    second.resume(told)
    assert second.joules == 350
    third = EnergyMeter(lambda: next(counter))
    third.resume(None)  # some steps were made on a device that tells nothing
    assert third.joules is None


def test_utilisation_is_the_mean_of_what_was_told_over_resumes() -> None:
    readings = iter([0.5, 1.0, 0.0])
    first = BusyMeter(lambda: next(readings))
    assert [first.look(), first.look()] == [{"gpu_utilisation": 0.5}, {"gpu_utilisation": 1.0}]
    second = BusyMeter(lambda: next(readings))
    second.told = first.told
    second.look()
    assert second.mean == 0.5


_FAKE_DRIVER = """
#include <string.h>
struct rates { unsigned int gpu, memory; };
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *name, void **handle) { *handle = (void *)7; return strcmp(name, "GPU-abc") ? 6 : 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *h, unsigned long long *mj) { *mj = 12500; return h == (void *)7 ? 0 : 2; }
int nvmlDeviceGetUtilizationRates(void *h, struct rates *r) { r->gpu = 83; r->memory = 12; return h == (void *)7 ? 0 : 2; }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler builds the driver's stand-in")
def test_the_drivers_calls_are_made_as_its_header_declares_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: a library of the same signatures stands in."""
    (tmp_path / "nvml.c").write_text(_FAKE_DRIVER)
    library = tmp_path / "nvml.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "nvml.c")], check=True, timeout=60)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(library)) if "nvidia-ml" in name else load(name))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="abc"))
    joules, utilisation = (read(torch.device("cuda")) for read in (nvml_joules, nvml_utilisation))
    assert joules is not None
    assert utilisation is not None
    assert (joules(), utilisation()) == (12.5, 0.83)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="other"))
    assert nvml_utilisation(torch.device("cuda")) is None
