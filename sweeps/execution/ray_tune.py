"""Configure Ray wherever it places workers: access, folders and memory. Needs no torch."""

import contextlib
import functools
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from cnnjepa.run.files import write_atomic
from cnnjepa.run.typed import build
from jobs.cli import STOP_SIGNALS

OBJECT_STORE_BYTES = 80 * 2**20  # no worker puts anything there; Ray wants at least 75 MiB
ENVIRONMENT = {
    # Without a token, every user of the machine could run code as this user, through Ray's ports.
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Ray would kill workers for memory that others use. The kernel and Slurm kill the culprit.
    "RAY_memory_monitor_refresh_ms": "0",
    # Ray starts its workers at nice 15: a trial would stand still beside any busy process.
    "RAY_worker_niceness": "0",
}
NODE_LABEL = "slurm-node"  # Ray's label of a node, with Slurm's name for it
# Deaths of its process per trial that a worker may take. The process after the second one finds
# that the trial has failed.
_DEATHS = 2
_TEMPORARY, _PREFIX = Path("/tmp"), "cnnjepa-"  # noqa: S108, mkdtemp makes a folder of mode 0700 there


def private_folder() -> Path:
    """Return a new private folder on this machine. Its path leaves room for sockets (107 bytes)."""
    remove_abandoned()
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_TEMPORARY))


_HELD = "held.json"


@dataclass(frozen=True)
class Held:
    """What a sweep holds of this machine while its command runs."""

    sweep: str
    cores: int
    gpus: float


def hold(private: Path, held: Held) -> None:
    """Let other sweeps on this machine know what this one holds, until its private folder is removed."""
    write_atomic(private / _HELD, json.dumps(asdict(held)))


def held_by_others(private: Path) -> list[Held]:
    """Return what this user's other sweeps, whose commands still run, hold of this machine."""
    found = []
    for path in sorted(_TEMPORARY.glob(f"{_PREFIX}*-*")):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        # Another version's, one that just begins or ends, and one of another user have nothing to read.
        with contextlib.suppress(OSError, ValueError, TypeError):
            if path != private and path.stat().st_uid == os.getuid() and pid.isdigit() and psutil.pid_exists(int(pid)):
                found.append(build(Held, json.loads((path / _HELD).read_text())))
    return found


def remove_abandoned() -> None:
    """Remove our private folders whose processes were killed before they could."""
    for path in _TEMPORARY.glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid() and pid.isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Restore the signal handlers at the end: `ray.init` installs one that ends the process.

    It does so in the main thread alone, where alone Python allows it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def path_of_workers(code: Path | None) -> Iterator[None]:
    """Let processes that start inside the block find the snapshot `code` first, and then what this one finds.

    Beside Python's own folders, that is the folder of the script, and the current one for `python -m`.
    """
    before = os.environ.get("PYTHONPATH")
    own = [str(Path(entry or ".").resolve()) for entry in sys.path[:1] if entry != str(Path(sys.executable).parent)]
    words = [*([str(code)] if code else []), *filter(None, (before or "").split(os.pathsep)), *own]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(words))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def own_path_only() -> Any:
    """Return a configuration with which Ray's workers have no other path than `path_of_workers` gives.

    Ray would put the driver's script and current folder before the snapshot.
    """
    from ray.job_config import JobConfig

    class OwnPath(JobConfig):
        def _runtime_env_has_working_dir(self) -> bool:
            return True  # then Ray adds no folder of the driver's

    return OwnPath()


@functools.cache
def _token() -> str:
    """Return the token, one per process: Ray reads it only once."""
    return secrets.token_hex(32)


def write_token(folder: Path) -> Path:
    """Write the token to a file that only this user can read; return its path."""
    path = folder / "token"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(_token())
    return path


def is_noted(folder: Path, name: str) -> bool:
    """Return whether `folder` holds the file `name`, or is gone.

    NFS may hide a file for up to a minute after it was found missing, but it rereads the listing.
    """
    try:
        return name in os.listdir(folder)
    except FileNotFoundError:
        return True


def kill(processes: list[psutil.Process]) -> None:
    """Send SIGKILL to the processes that still run, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def without_client_server(parameters: Any, _head: bool) -> None:
    """Disable the `ray://` server, whose fixed port two users would want. Ray calls this hook."""
    parameters.ray_client_server_port = None


class _OfThisThread:
    """Standard output that is a log for the thread that makes it, and the former one for all others."""

    def __init__(self, stream: Any, log: Any) -> None:
        self._stream, self._log, self._thread = stream, log, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log if threading.get_ident() == self._thread else self._stream, name)


def place(
    worker: Callable[[], None],
    workers: int,
    parallel: int,
    resources: Mapping[str, float],
    folder: Path,
    trials_per_worker: int = 1,
    avoid: Sequence[str] = (),
) -> list[str]:
    """Call `worker` `workers` times with Ray Tune, at most `parallel` at once; return the errors.

    A call whose process dies takes no other one along. A new process replaces it at once on the
    same node. Tune's own files go into `folder`, which all nodes see. They are never read back.
    Nothing is placed on nodes whose label NODE_LABEL is in `avoid`.
    """
    from ray import tune

    def one(_config: dict[str, int]) -> None:
        worker()

    needs: Any = dict(resources)
    if avoid:
        selector = {NODE_LABEL: f"!in({','.join(avoid)})"}
        needs = tune.PlacementGroupFactory([{k.upper(): v for k, v in needs.items() if v}], bundle_label_selector=[selector])
    tuner = tune.Tuner(
        tune.with_resources(one, needs),
        param_space={"worker": tune.grid_search(list(range(workers)))},
        # Reused actors import torch once instead of once per worker.
        tune_config=tune.TuneConfig(max_concurrent_trials=parallel, reuse_actors=True),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=str(folder / "tune"),
            failure_config=tune.FailureConfig(max_failures=_DEATHS * trials_per_worker),
            verbose=0,
        ),
    )
    # The sweep shows its own table instead of Tune's, and the errors that this returns.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with open(folder / "tune.log", "a") as log, contextlib.redirect_stdout(_OfThisThread(sys.stdout, log)):
        return [str(error).strip().splitlines()[-1] for error in tuner.fit().errors]
