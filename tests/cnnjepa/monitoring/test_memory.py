"""The peak of memory in MiB, whoever tells it."""

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cnnjepa.monitoring import memory
from cnnjepa.monitoring.memory import peak_memory_mb, reset_peak_memory
from cnnjepa.run.ranks import Ranks

CPU, CUDA = (Ranks(0, 1, torch.device(kind)) for kind in ("cpu", "cuda"))


def test_the_peak_is_the_systems_in_mib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t 9999999 kB\nVmHWM:\t  524288 kB\nVmRSS:\t  100 kB\n")
    monkeypatch.setattr(memory, "_STATUS", status)
    assert peak_memory_mb(CPU) == 512
    status.unlink()
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3072 * (who == resource.RUSAGE_SELF)))
    assert peak_memory_mb(CPU) == 3


def test_on_cuda_it_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 7 * 2**20)
    assert peak_memory_mb(CUDA) == 5


def test_a_new_run_forgets_the_peak_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = tmp_path / "clear_refs"
    monkeypatch.setattr(memory, "_PEAK_RESET", written)
    reset_peak_memory()
    assert written.read_text() == "5"  # proc(5): resets the peak resident set size, and nothing else
    monkeypatch.setattr(memory, "_PEAK_RESET", tmp_path / "no" / "such")
    reset_peak_memory()
