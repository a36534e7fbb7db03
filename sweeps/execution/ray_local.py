"""Ray Tune places slots on this machine, within its cores, devices and memory. Its state is disposable: the run folders are the truth."""

import logging
import os
import shutil
from pathlib import Path

import psutil
import torch

from cnnjepa.run.files import write_atomic
from jobs.cluster import ClusterProfile
from sweeps.execution.ray_tune import ENVIRONMENT, OBJECT_STORE_BYTES, kill, place, private_folder, signals_kept, write_token
from sweeps.execution.worker import run_slots
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep

# What Ray's own processes hold beside the slots.
RAY_MEMORY_GB = 1.0
# Told of 127.0.0.1 alone, Ray takes it for "find the address that others reach", and listens on all; without clusters it stays at home.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
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
        self._private = private_folder()
        self._stop = self._private / "stop"

    def stop(self) -> None:
        """Ask all slots to save and return; those not begun return at once."""
        if self._private.exists():
            write_atomic(self._stop, "")

    def start(self) -> None:
        """Start Ray; from the main thread, since Ray's processes end with the thread that started them."""
        os.environ |= {**ENVIRONMENT, **_LOOPBACK, "RAY_AUTH_TOKEN_PATH": str(write_token(self._private))}
        import ray

        with signals_kept():
            ray.init(
                address="local",
                num_cpus=self.cores,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(self._private / "ray"),
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )

    def place(self, slots: int, silent: frozenset[Path]) -> list[str]:
        """Run `slots` slots, at most `parallel` at once; a slot whose process dies costs that slot alone. Returns their errors."""
        driver, stop, private = Process.me(), self._stop, self._private
        sweep, cluster = self.sweep, self.cluster

        def asked_to_stop() -> bool:
            return stop.exists() or not private.exists() or not driver.lives()

        def slot() -> None:
            run_slots(sweep, cluster, driver.driver, asked_to_stop, silent)

        trials = sweep.search.points * sweep.search.seeds if sweep.search else 1
        return place(slot, slots, self.parallel, {"cpu": cluster.cores_per_slot, "gpu": cluster.gpus_per_slot}, private, trials)

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
