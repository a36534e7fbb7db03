"""What this machine has room for, as the kernel and a container's limits tell it, and what Ray may be given."""

import os
import shutil
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from jobs.cluster import ClusterProfile
from sweeps.execution import ray_local, ray_tune
from sweeps.execution.ray_local import parallel_workers, usable_cores, usable_memory_gb
from sweeps.spec.sweep import ScaleName
from sweeps.state.folder import Sweep
from tests.support.tiny_sweep import sweep


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """8 cores and 16 GiB free; the container's limits are the files of a folder."""
    monkeypatch.setattr(ray_local, "_CGROUP", tmp_path)
    monkeypatch.setattr(ray_local.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(ray_local.psutil, "virtual_memory", lambda: SimpleNamespace(available=16 * 2**30, total=64 * 2**30))
    return tmp_path


@pytest.mark.parametrize(("share", "cores"), [("", 8), ("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8)])
def test_cores_are_those_of_the_container(machine: Path, share: str, cores: int) -> None:
    if share:
        (machine / "cpu.max").write_text(f"{share}\n")
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("limit", "used", "gigabytes"),
    [("", "", 16.0), ("max", str(2**30), 16.0), (str(8 * 2**30), str(3 * 2**30), 5.0), (str(64 * 2**30), str(2**30), 16.0)],
)
def test_memory_is_what_the_container_has_left(machine: Path, limit: str, used: str, gigabytes: float) -> None:
    for name, text in {"memory.max": limit, "memory.current": used}.items():
        if text:
            (machine / name).write_text(f"{text}\n")
    assert usable_memory_gb() == gigabytes


def test_ray_has_a_gigabyte_of_its_own() -> None:
    profile = ClusterProfile("x", cores_per_trial=1, memory_gb_per_trial=4)
    assert [parallel_workers(profile, 64, 0, memory) for memory in (5.0, 8.9, 9.0, 13.0)] == [1, 1, 2, 3]
    with pytest.raises(ValueError, match=r"memory_gb_per_trial must fit .*; got 4\.9 GB free, 4 per trial and 1\.0 for Ray"):
        parallel_workers(profile, 64, 0, 4.9)
    with pytest.raises(ValueError, match="gpus_per_trial must fit this machine at least once; got 1 devices, 2 per trial"):
        parallel_workers(ClusterProfile("x", gpus_per_trial=2), 64, 1, 100.0)


def test_the_token_is_this_users_alone_and_the_same_for_the_process(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        first = ray_tune.write_token(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert len(first.read_text()) == 64
    (tmp_path / "other").mkdir()
    assert ray_tune.write_token(tmp_path / "other").read_text() == first.read_text()
    with pytest.raises(FileExistsError):  # nobody can put one there before
        ray_tune.write_token(tmp_path)


def test_a_folder_that_is_gone_has_noted_everything(tmp_path: Path) -> None:
    assert not ray_tune.is_noted(tmp_path, "stop")
    (tmp_path / "stop").touch()
    assert ray_tune.is_noted(tmp_path, "stop")
    assert ray_tune.is_noted(tmp_path / "gone", "stop")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ray_local.LocalEngine:
    for key, value in {**ray_tune.ENVIRONMENT, **ray_local._LOOPBACK, "RAY_AUTH_TOKEN_PATH": ""}.items():
        monkeypatch.setenv(key, value)  # and as before after the test
    monkeypatch.setattr(ray_local, "private_folder", lambda: tmp_path)
    return ray_local.LocalEngine(Sweep.of(sweep(), ScaleName.smoke, [], tmp_path / "sweep"), ClusterProfile("x"))


@pytest.mark.parametrize("late", [1, 2, 3])
def test_ray_gets_three_chances_to_start_on_a_crowded_machine(
    engine: ray_local.LocalEngine, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    """Ray's own wait of 30 s is played by an error; the process that it leaves behind is real."""
    import ray

    left: list[subprocess.Popen[bytes]] = []

    def slow(**_: object) -> None:
        if len(left) < late:
            left.append(subprocess.Popen(["sleep", "600"]))
            raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr(ray, "init", slow)
    if late == 3:
        with pytest.raises(
            ValueError, match="this machine must give Ray the time to start; it did not start 3 times in half a minute each"
        ):
            engine.start()
    else:
        engine.start()
    assert len(left) == late
    assert not any(psutil.pid_exists(process.pid) for process in left)


def test_a_folder_that_was_removed_and_made_again_is_noticed(engine: ray_local.LocalEngine, tmp_path: Path) -> None:
    assert engine.lost_folder == ""
    shutil.rmtree(tmp_path)
    (tmp_path / "ray").mkdir(parents=True)
    assert engine.lost_folder == str(tmp_path)


def test_any_other_fault_of_ray_is_not_tried_again(engine: ray_local.LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    tries: list[int] = []

    def broken(**_: object) -> None:
        tries.append(1)
        raise ConnectionError("no such address")

    monkeypatch.setattr(ray, "init", broken)
    with pytest.raises(ConnectionError):
        engine.start()
    assert tries == [1]
