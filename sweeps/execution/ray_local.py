"""Place workers with Ray Tune on this machine, within its cores, devices and memory."""

import contextlib
import logging
import os
import shutil
from pathlib import Path

import psutil
import torch

from cnnjepa.run.files import write_atomic
from jobs.cli import printable
from jobs.cluster import ClusterProfile
from sweeps.execution.ray_tune import (
    ENVIRONMENT,
    OBJECT_STORE_BYTES,
    Held,
    held_by_others,
    hold,
    kill,
    own_path_only,
    path_of_workers,
    place,
    private_folder,
    signals_kept,
    write_token,
)
from sweeps.execution.worker import run_worker
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep

# Memory of Ray's own processes, beside the workers.
RAY_MEMORY_GB = 1.0
# Even if given 127.0.0.1, Ray otherwise looks for a reachable address and listens on all.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_CGROUP = Path("/sys/fs/cgroup")


def _cgroup(name: str) -> list[str]:
    """Return the words of one of the container's cgroup files, or ["max"] without it."""
    path = _CGROUP / name
    return path.read_text().split() if path.exists() else ["max"]


def usable_cores() -> int:
    """Return the cores this process may use, at most the container's share of CPU time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = _cgroup("cpu.max")
    return cores if share[0] == "max" else max(min(cores, int(share[0]) // int(share[1])), 1)


def usable_memory_gb() -> float:
    """Return the free memory in GiB, at most what the container has left."""
    free = psutil.virtual_memory().available
    limit, used = _cgroup("memory.max")[0], _cgroup("memory.current")[0]
    if limit != "max" and used != "max":
        free = min(free, int(limit) - int(used))
    return free / 2**30


def workers_here(cluster: ClusterProfile) -> int:
    """Return how many workers fit this machine now. See `parallel_workers`."""
    return parallel_workers(cluster, usable_cores(), torch.cuda.device_count(), usable_memory_gb())


_STARTS, _TOO_SLOW = 3, "timed out during startup"  # Ray waits 30 s for its own processes


def parallel_workers(cluster: ClusterProfile, cores: int, devices: int, memory_gb: float) -> int:
    """Return how many workers fit at once; raise ValueError with the short resource if none."""
    fits = {
        "cores_per_trial": (cores // cluster.cores_per_trial, f"{cores} cores, {cluster.cores_per_trial} per trial"),
        "memory_gb_per_trial": (
            int((memory_gb - RAY_MEMORY_GB) // cluster.memory_gb_per_trial),
            f"{memory_gb:.1f} GB free, {cluster.memory_gb_per_trial} per trial and {RAY_MEMORY_GB} for Ray",
        ),
    }
    if cluster.gpus_per_trial:
        fits["gpus_per_trial"] = int(devices / cluster.gpus_per_trial), f"{devices} devices, {cluster.gpus_per_trial} per trial"
    for key, (count, have) in fits.items():
        if count < 1:
            raise ValueError(f"{key} must fit this machine at least once; got {have}")
    most = min(count for count, _ in fits.values())
    return min(most, cluster.max_parallel) if cluster.max_parallel else most


class LocalEngine:
    """Places workers with Ray Tune until all have returned.

    `place` blocks; another thread may call `stop`. Workers also stop, at their next step, if this
    process or its private folder is gone.
    """

    def __init__(self, sweep: Sweep, cluster: ClusterProfile, code: Path | None = None) -> None:
        """Set up the engine; raise ValueError if the machine has no room for one worker.

        Workers run the snapshot `code`, or without one what this process finds on its path.
        """
        self.sweep, self.cluster, self.code = sweep, cluster, code
        self.cores = usable_cores()
        self.parallel = workers_here(cluster)
        # The command prints this once: unused devices would be a slow surprise.
        self.unused_devices = 0 if cluster.gpus_per_trial else torch.cuda.device_count()
        self._private = private_folder()
        self._stop = self._private / "stop"
        self._token = write_token(self._private)  # while it is there, so is the folder; Ray would make the folder again

    def shared_line(self) -> str:
        """Return what other sweeps hold of the cores that this one counts as its own, or ""."""
        others = held_by_others(self._private)
        if not others:
            return ""
        held = ", ".join(f"{printable(other.sweep)} holds {other.cores}" for other in others)
        what = f"other sweeps run on this machine: {held} of its {self.cores} cores, which this one does not leave to them"
        return f"{what}; all become slower: cluster.max_parallel=N limits how many trials it runs at once"

    @property
    def lost_folder(self) -> str:
        """Return the private folder if something has removed it, as cleaners of /tmp do, or ""."""
        return "" if self._token.exists() else str(self._private)

    def stop(self) -> None:
        """Ask all workers to save and return. Those that have not begun return at once."""
        if self._private.exists():
            write_atomic(self._stop, "")

    def start(self) -> None:
        """Start Ray; raise ValueError if it does not start on a crowded machine.

        Call this in the main thread: Ray's processes end with their thread.
        """
        cores, gpus = (each * self.parallel for each in (self.cluster.cores_per_trial, self.cluster.gpus_per_trial))
        hold(self._private, Held(str(self.sweep.path), int(cores), gpus))
        os.environ |= {**ENVIRONMENT, **_LOOPBACK, "RAY_AUTH_TOKEN_PATH": str(self._token)}
        before = set(psutil.Process().children(recursive=True))
        for left in reversed(range(_STARTS)):
            try:
                return self._init()
            except Exception as error:  # Ray has no class of its own for it
                if _TOO_SLOW not in str(error):
                    raise
                kill([p for p in psutil.Process().children(recursive=True) if p not in before])
                if not left:
                    rule = f"give Ray the time to start; it did not start {_STARTS} times in half a minute each"
                    raise ValueError(f"this machine must {rule}: type the command again when the machine is less busy") from error

    def _init(self) -> None:
        import ray

        with signals_kept(), path_of_workers(self.code):
            ray.init(
                job_config=own_path_only(),
                address="local",
                num_cpus=self.cores,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(self._private / "ray"),
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
            )

    def place(self, workers: int, silent: frozenset[Path]) -> list[str]:
        """Run `workers` workers, at most `parallel` at once; return their errors.

        Raise RuntimeError if Ray ends.
        """
        driver, stop, private, token = Process.me(), self._stop, self._private, self._token
        sweep, cluster = self.sweep, self.cluster

        def asked_to_stop() -> bool:
            return stop.exists() or not token.exists() or not driver.lives()

        def worker() -> None:
            run_worker(sweep, cluster, driver.driver, asked_to_stop, silent)

        trials = sweep.search.max_trials * sweep.search.seeds if sweep.search else 1
        try:
            return place(worker, workers, self.parallel, {"cpu": cluster.cores_per_trial, "gpu": cluster.gpus_per_trial}, private, trials)
        except Exception as error:  # Ray and Tune have no class of their own for all of them
            what = f"got {type(error).__name__}: {error}" if token.exists() else f"its folder {private} was removed"
            raise RuntimeError(f"Ray must keep running while trials run; {what}: type the command again, which resumes them") from error

    def close(self) -> None:
        """Shut Ray down and remove the private folder. Other processes that the caller has started live on."""
        import ray

        if ray.is_initialized():
            started = self._of_ray()
            ray.shutdown()
            kill(started)  # two of Ray's agents would linger for a minute
        shutil.rmtree(self._private, ignore_errors=True)

    def abandon(self, all_children: bool = True) -> None:
        """Kill Ray's processes, or all that this one has started. Running trials can resume from their checkpoints."""
        # Ray's agents are no longer below this process once the one that started them has died.
        agents = [p for p in psutil.process_iter(["cmdline"]) if _is_rays(p.info["cmdline"] or [], self._private)]
        below = psutil.Process().children(recursive=True) if all_children else self._of_ray()
        kill([*below, *agents])
        shutil.rmtree(self._private, ignore_errors=True)

    def _of_ray(self) -> list[psutil.Process]:
        """Return Ray's processes below this one, and all that they have started."""
        found = []
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if _is_rays(child.cmdline(), self._private):
                    found += [*child.children(recursive=True), child]
        return found


def _is_rays(words: list[str], folder: Path) -> bool:
    """Return whether a command line is that of a process of Ray's which works in `folder`."""
    return any("/ray/" in word for word in words[:3]) and any(f"{folder}/" in word for word in words)
