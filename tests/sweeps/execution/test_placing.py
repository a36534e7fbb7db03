"""What Ray is given, and what stands around it: who may read, what a node offers, who is marked dead; without Ray."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from jobs.cluster import ClusterProfile
from sweeps.execution import ray_allocation, ray_local, ray_node, ray_tune
from sweeps.execution.ray_allocation import AllocationEngine
from sweeps.execution.ray_local import parallel_workers, usable_cores, usable_memory_gb
from sweeps.state.claims import SlurmStart

ROOT = Path(__file__).parents[3]


def test_the_token_can_be_read_by_this_user_alone_and_is_not_written_twice(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = ray_tune.write_token(tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(bytes.fromhex(path.read_text())) == 32
    with pytest.raises(FileExistsError):
        ray_tune.write_token(tmp_path)


def test_folders_are_removed_that_are_this_users_and_whose_process_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setattr(ray_tune, "_TEMPORARY", tmp_path)
    monkeypatch.setattr(psutil, "pid_exists", lambda pid: pid == os.getpid())
    names = [f"cnnjepa-{ended.pid}-a", f"cnnjepa-{os.getpid()}-b", "cnnjepa-docs-c", f"other-{ended.pid}-d"]
    for name in names:
        (tmp_path / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: os.geteuid() + 1)
        ray_tune.remove_abandoned()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    ray_tune.remove_abandoned()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[1:])


def test_a_note_is_seen_and_a_folder_that_is_gone_counts_as_one(tmp_path: Path) -> None:
    assert not ray_tune.is_noted(tmp_path, "stop")
    (tmp_path / "stop").touch()
    assert ray_tune.is_noted(tmp_path, "stop")
    assert not ray_tune.is_noted(tmp_path, "end")
    assert ray_tune.is_noted(tmp_path / "gone", "stop")


def test_signals_are_handled_after_a_block_as_before_it() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    try:
        with contextlib.suppress(ConnectionError), ray_tune.signals_kept():
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)
            raise ConnectionError
        assert [signal.getsignal(number) for number in numbers] == before
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("limit", "cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), (None, 8)]
)
def test_a_containers_share_of_processor_time_is_what_is_there(
    limit: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_local, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    assert usable_cores() == cores


@pytest.mark.parametrize(
    ("limit", "used", "free"), [("max", 2**30, 16.0), (8 * 2**30, 3 * 2**30, 5.0), (64 * 2**30, 2**30, 16.0), (None, None, 16.0)]
)
def test_memory_that_a_container_holds_already_is_not_free(
    limit: object, used: object, free: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_local, "_CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=16 * 2**30))
    for name, value in (("memory.max", limit), ("memory.current", used)):
        if value is not None:
            (tmp_path / name).write_text(f"{value}\n")
    assert usable_memory_gb() == free


def test_workers_leave_ray_its_memory_and_share_devices() -> None:
    profile = ClusterProfile("x", cores_per_trial=1, memory_gb_per_trial=4)
    assert [parallel_workers(profile, cores=64, devices=0, memory_gb=gb) for gb in (5.0, 8.9, 9.0, 12.9)] == [1, 1, 2, 2]
    shared = ClusterProfile("x", gpus_per_trial=0.25)
    assert parallel_workers(shared, cores=64, devices=3, memory_gb=1000) == 12
    with pytest.raises(ValueError, match="gpus_per_trial must fit this machine at least once; got 1 devices, 2 per trial"):
        parallel_workers(ClusterProfile("x", gpus_per_trial=2), cores=64, devices=1, memory_gb=1000)
    assert parallel_workers(ClusterProfile("x", max_parallel=3), cores=64, devices=0, memory_gb=1000) == 3


def test_a_node_offers_ray_the_cores_of_all_its_workers_and_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    submission = SimpleNamespace(
        allocation=SimpleNamespace(workers_per_node=3),
        worker_profile=SimpleNamespace(cores_per_trial=4),
        cluster=SimpleNamespace(gpus_per_node=6),
    )
    head, worker = (ray_node.command(submission, role, Path("/x"), "10.0.0.1:6379") for role in ("head", "worker"))  # type: ignore[arg-type]
    for line in (head, worker):
        assert {"--num-cpus=12", "--num-gpus=6", "--temp-dir=/x/ray", "--node-ip-address=127.0.0.1"} <= set(line)
    assert "--head" in head
    assert "--address=10.0.0.1:6379" in worker
    assert not [word for word in head if word.startswith("--address=")]


@pytest.mark.parametrize(("ended", "status"), [(False, 1), (True, 0)])
def test_a_node_whose_ray_ends_by_itself_fails_and_has_the_others_save(ended: bool, status: int, tmp_path: Path) -> None:
    """In a process of its own, since it ends all its children."""
    folder, temporary = tmp_path / "shared", tmp_path / "own"
    folder.mkdir()
    temporary.mkdir()
    (folder / "address").write_text("10.0.0.1:6379")
    if ended:
        (folder / "end").touch()
    code = f"""
from pathlib import Path
from sweeps.execution import ray_node
ray_node.command = lambda *_: ["sleep", "600"] if {ended} else ["sh", "-c", "echo no memory left; exit 3"]
ray_node.environment = lambda _: {{}}
print("status", ray_node.run_node("worker", None, Path({str(folder)!r}), Path({str(temporary)!r})))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == f"status {status}"
    assert ("Ray has ended by itself: no memory left" in done.stdout) is not ended
    assert (folder / "stop").exists() is not ended


def test_an_allocation_buries_the_owners_of_its_own_job_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def claimed(job: str | None) -> SimpleNamespace:
        return SimpleNamespace(slurm=job and SlurmStart("c", job, 0, "n1", 1.0, "", ""))

    past = {"a": [claimed("17"), claimed("18")], "b": [claimed("18"), claimed("17")], "c": [claimed(None)], "d": []}
    marked_dead: list[tuple[str, object]] = []
    watch = SimpleNamespace(mark_dead=lambda path, claim: marked_dead.append((path, claim)))
    view = SimpleNamespace(claims=past.get, watch=watch)
    engine = SimpleNamespace(sweep=SimpleNamespace(trials=list(past), trial_dir=lambda trial: f"trials/{trial}"))
    monkeypatch.setattr(ray_allocation, "own_job", lambda: "17")
    AllocationEngine.mark_dead(engine, view)  # type: ignore[arg-type]
    assert marked_dead == [("trials/b", past["b"][-1])]


def test_tune_is_given_how_many_workers_at_once_what_each_holds_and_how_often_one_may_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: dict[str, Any] = {}

    def tuner(trainable: object, **settings: Any) -> SimpleNamespace:
        reported.update(settings, trainable=trainable)
        return SimpleNamespace(fit=lambda: SimpleNamespace(errors=["Traceback\n  one line\nno memory \n"]))

    def as_given(**settings: Any) -> dict[str, Any]:
        return settings

    tune = SimpleNamespace(with_resources=lambda work, resources: (work, resources), grid_search=list, Tuner=tuner)
    tune.TuneConfig = tune.RunConfig = tune.FailureConfig = as_given
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(tune=tune))
    begun: list[int] = []
    errors = ray_tune.place(lambda: begun.append(1), 5, 2, {"cpu": 4, "gpu": 0.5}, tmp_path, 3)
    assert errors == ["no memory"]
    assert reported["param_space"] == {"worker": [0, 1, 2, 3, 4]}
    assert reported["tune_config"] == {"max_concurrent_trials": 2, "reuse_actors": True}
    assert reported["run_config"]["failure_config"] == {"max_failures": 6}  # two deaths of each of the trials that it may take
    assert reported["run_config"]["storage_path"] == str(tmp_path / "tune")
    work, resources = reported["trainable"]
    assert resources == {"cpu": 4, "gpu": 0.5}
    work({"worker": 3})
    assert begun == [1]


def test_a_signal_is_handed_on_at_every_look_and_the_sweep_is_shown_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stopped, done = [1000.0], [False], list[str]()
    monkeypatch.setattr(ray_allocation, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    engine = SimpleNamespace(stop=lambda: done.append("stop"), driver="me", end=None, nodes=None)
    watcher = SimpleNamespace(show=lambda: done.append("show"), view=None, enter=done.append)
    monkeypatch.setattr(ray_allocation, "saving", lambda view: "saving 2 trials")
    monkeypatch.setattr(ray_allocation, "HungWorkers", lambda *_: SimpleNamespace(look=lambda view: []))
    look = ray_allocation.HandOn(lambda: stopped[0], engine, watcher)  # type: ignore[arg-type]
    for seconds in (0.0, 9.0, 2.0, 9.5):
        clock[0] += seconds
        look.show()
    assert done == ["show", "show"]
    stopped[0] = True
    look.show()
    look.show()
    assert done == ["show", "show", *["stop", "saving 2 trials"] * 2]


def test_a_stop_is_noted_once_for_all_nodes(tmp_path: Path) -> None:
    engine = SimpleNamespace(folder=tmp_path, stopping=lambda: ray_tune.is_noted(tmp_path, "stop"))
    AllocationEngine.stop(engine)  # type: ignore[arg-type]
    first = (tmp_path / "stop").stat()
    AllocationEngine.stop(engine)  # type: ignore[arg-type]
    assert (tmp_path / "stop").stat().st_ino == first.st_ino
