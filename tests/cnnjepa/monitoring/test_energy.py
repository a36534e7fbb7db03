import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pynvml
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
    reported = first.joules
    assert reported == 250
    second = EnergyMeter(lambda: next(counter))
    second.resume(reported)
    assert second.joules == 350
    third = EnergyMeter(lambda: next(counter))
    third.resume(None)  # some steps were made on a device that tells nothing
    assert third.joules is None


def test_utilisation_is_the_mean_of_what_was_recorded_over_resumes() -> None:
    readings = iter([0.5, 1.0, 0.0])
    first = BusyMeter(lambda: next(readings))
    assert [first.look(), first.look()] == [{"gpu_utilisation": 0.5}, {"gpu_utilisation": 1.0}]
    second = BusyMeter(lambda: next(readings))
    second.recorded = first.recorded
    second.look()
    assert second.mean == 0.5


# GPU-abc has both counters, GPU-mig no utilisation (3 is NVML's NOT_SUPPORTED); broken() makes all fail.
_FAKE_DRIVER = """
#include <string.h>
struct rates { unsigned int gpu, memory; };
static int error = 0;
void broken(void) { error = 999; }
int nvmlInitWithFlags(unsigned int flags) { return error; }
int nvmlDeviceGetHandleByUUID(const char *name, void **handle) {
    *handle = (void *)(strcmp(name, "GPU-mig") ? 7 : 8);
    return strcmp(name, "GPU-abc") && strcmp(name, "GPU-mig") ? 6 : error;
}
int nvmlDeviceGetTotalEnergyConsumption(void *h, unsigned long long *mj) {
    *mj = 12500;
    return error;
}
int nvmlDeviceGetUtilizationRates(void *h, struct rates *r) {
    r->gpu = 83, r->memory = 12;
    return h == (void *)7 ? error : 3;
}
"""
_NO_ENERGY = _FAKE_DRIVER.replace("TotalEnergyConsumption", "SomethingElse")


def install_fake_driver(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """There is no GPU here: pynvml calls a library with the signatures of NVML's header."""
    (folder / "nvml.c").write_text(source)
    library = folder / "nvml.so"
    command = ["cc", "-shared", "-fPIC", "-o", str(library), str(folder / "nvml.c")]
    subprocess.run(command, check=True, timeout=60)
    fake = ctypes.CDLL(str(library))
    monkeypatch.setattr(pynvml, "nvmlLib", fake)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    return fake


def name_gpu(uuid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))


needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler builds the fake driver")


@needs_compiler
def test_the_drivers_calls_are_made_as_its_header_declares_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install_fake_driver(_FAKE_DRIVER, tmp_path, monkeypatch)
    name_gpu("abc", monkeypatch)
    joules, utilisation = (read(torch.device("cuda")) for read in (nvml_joules, nvml_utilisation))
    assert joules is not None
    assert utilisation is not None
    assert (joules(), utilisation()) == (12.5, 0.83)
    fake.broken()
    assert (joules(), utilisation()) == (12.5, 0.83)  # the last readings: the run goes on
    assert nvml_joules(torch.device("cuda")) is None


@needs_compiler
def test_a_counter_that_the_device_or_its_driver_lacks_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_driver(_NO_ENERGY, tmp_path, monkeypatch)
    device = torch.device("cuda")
    name_gpu("abc", monkeypatch)
    assert nvml_joules(device) is None
    assert nvml_utilisation(device) is not None
    name_gpu("mig", monkeypatch)
    assert nvml_utilisation(device) is None
    name_gpu("other", monkeypatch)
    assert nvml_utilisation(device) is None


def test_a_machine_without_the_drivers_library_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", missing)
    assert nvml_joules(torch.device("cuda")) is None
    assert nvml_utilisation(torch.device("cuda")) is None
