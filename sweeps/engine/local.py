"""Ray Tune places slots on this machine, within its cores, devices and memory. Its state is disposable: the run folders are the truth."""

import contextlib
import logging
import os
import shutil
import tempfile
import uuid
from pathlib import Path

import psutil
import torch

from cnnjepa.files import write_atomic
from jobs.spec import ClusterProfile
from sweeps.claims import Process
from sweeps.folder import Sweep
from sweeps.slot import run_slots

# What Ray's own processes hold beside the slots.
RAY_MEMORY_GB = 1.0
_OBJECT_STORE_BYTES = 80 * 2**20
_TEMPORARY, _PREFIX = Path("/tmp"), "cnnjepa-"
_CGROUP = Path("/sys/fs/cgroup")


def _cgroup(name: str) -> list[str]:
    """The words of one of the container's limits; ["max"] where there is none."""
    path = _CGROUP / name
    return path.read_text().split() if path.exists() else ["max"]


def usable_cores() -> int:
    """Cores that this process may run on, no more than the container's share of processor time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = _cgroup("cpu.max")
    return cores if share[0] == "max" else max(min(cores, int(share[0]) // int(share[1])), 1)


def usable_memory_gb() -> float:
    """Memory that is free now, no more than the container has left."""
    free = psutil.virtual_memory().available
    limit, used = _cgroup("memory.max")[0], _cgroup("memory.current")[0]
    if limit != "max" and used != "max":
        free = min(free, int(limit) - int(used))
    return free / 2**30


def slots_here(cluster: ClusterProfile) -> int:
    """How many slots fit this machine now; raises ValueError, naming what is short, where not even one does."""
    return parallel_slots(cluster, usable_cores(), torch.cuda.device_count(), usable_memory_gb())


def parallel_slots(cluster: ClusterProfile, cores: int, devices: int, memory_gb: float) -> int:
    """How many slots fit at once; raises ValueError, naming what is short, where not even one does."""
    fits = {
        "cores_per_slot": (cores // cluster.cores_per_slot, f"{cores} cores, {cluster.cores_per_slot} a slot"),
        "memory_gb_per_slot": (
            int((memory_gb - RAY_MEMORY_GB) // cluster.memory_gb_per_slot),
            f"{memory_gb:.1f} GB free, {cluster.memory_gb_per_slot} a slot and {RAY_MEMORY_GB} for Ray",
        ),
    }
    if cluster.gpus_per_slot:
        fits["gpus_per_slot"] = int(devices / cluster.gpus_per_slot), f"{devices} devices, {cluster.gpus_per_slot} a slot"
    for key, (count, have) in fits.items():
        if count < 1:
            raise ValueError(f"{key} must fit this machine at least once; got {have}")
    most = min(count for count, _ in fits.values())
    return min(most, cluster.max_parallel) if cluster.max_parallel else most


def remove_abandoned() -> None:
    """Remove our private folders whose process was killed before it could."""
    for path in _TEMPORARY.glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid() and pid.isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(path, ignore_errors=True)


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to those that still run, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


class LocalEngine:
    """Places slots by Ray Tune until they have all returned; `place` blocks, `stop` may be called from another thread.

    The private folder holds Ray's sockets and logs and the stop file; when it is gone, or this process, slots stop at their next step.
    """

    def __init__(self, sweep: Sweep, cluster: ClusterProfile) -> None:
        """Raises ValueError where the machine has no room for one slot."""
        self.sweep, self.cluster = sweep, cluster
        self.cores = usable_cores()
        self.parallel = slots_here(cluster)
        # Said once by the command: a slow surprise otherwise.
        self.unused_devices = 0 if cluster.gpus_per_slot else torch.cuda.device_count()
        # Ray puts sockets into it, whose paths must stay below 107 characters.
        remove_abandoned()
        self._private = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_TEMPORARY))
        self._stop = self._private / "stop"

    def stop(self) -> None:
        """Ask all slots to save and return; those not begun return at once."""
        if self._private.exists():
            write_atomic(self._stop, "")

    def start(self) -> None:
        """Start Ray; from the main thread, since Ray's processes end with the thread that started them."""
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        import ray

        ray.init(
            address="local",
            num_cpus=self.cores,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(self._private / "ray"),
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )

    def place(self, slots: int, silent: frozenset[Path]) -> list[str]:
        """Run `slots` slots, at most `parallel` at once; a slot whose process dies costs that slot alone. Returns their errors."""
        from ray import tune

        driver, stop, private = Process.me(), self._stop, self._private
        sweep, cluster = self.sweep, self.cluster

        def asked_to_stop() -> bool:
            return stop.exists() or not private.exists() or not driver.lives()

        def slot(_config: dict[str, int]) -> None:
            run_slots(sweep, cluster, driver.driver, asked_to_stop, silent)

        resources = {"cpu": cluster.cores_per_slot, "gpu": cluster.gpus_per_slot}
        tuner = tune.Tuner(
            tune.with_resources(slot, resources),
            param_space={"slot": tune.grid_search(list(range(slots)))},
            # Reused actors import torch once and not once a slot.
            tune_config=tune.TuneConfig(max_concurrent_trials=self.parallel, reuse_actors=True),
            run_config=tune.RunConfig(name=uuid.uuid4().hex[:8], storage_path=str(private / "tune"), verbose=0),
        )
        with open(private / "tune.log", "a") as log, contextlib.redirect_stdout(log):  # the sweep shows its own table
            return [str(error).strip().splitlines()[-1] for error in tuner.fit().errors]

    def close(self) -> None:
        """Shut Ray down and remove the private folder."""
        import ray

        if ray.is_initialized():
            started = psutil.Process().children(recursive=True)
            ray.shutdown()
            kill(started)  # two of Ray's agents would linger for a minute
        shutil.rmtree(self._private, ignore_errors=True)

    def abandon(self) -> None:
        """End all that was started here at once; running trials go on from their last checkpoints another time."""
        kill(psutil.Process().children(recursive=True))
        shutil.rmtree(self._private, ignore_errors=True)
