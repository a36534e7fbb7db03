"""What Ray is told wherever it places slots: who may connect, where its files lie, how little it may hold; needs no torch."""

import contextlib
import functools
import os
import secrets
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

OBJECT_STORE_BYTES = 80 * 2**20  # no slot puts anything there; Ray wants 75 MiB at least
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",  # who can reach Ray's ports runs code as us, and every user of the machine can
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # Ray's monitor would end slots for memory that anything on the machine holds; the kernel, and Slurm's limits, end who is at fault.
    "RAY_memory_monitor_refresh_ms": "0",
}
_DEATHS = 2  # of the processes of one slot for each trial that it may take: that after the second finds that its trial has failed
_TEMPORARY, _PREFIX = Path("/tmp"), "cnnjepa-"  # noqa: S108, mkdtemp makes a folder of mode 0700 there


def private_folder() -> Path:
    """A new folder on this machine that only this user can look into; short, since Ray puts sockets into it (107 characters at most)."""
    remove_abandoned()
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_TEMPORARY))


def remove_abandoned() -> None:
    """Remove our private folders whose process was killed before it could."""
    for path in _TEMPORARY.glob(f"{_PREFIX}*-*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid() and pid.isdigit() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """After the block signals are handled as before it: `ray.init` handles SIGTERM, and ends the process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@functools.cache
def _token() -> str:
    """One a process: Ray reads it once."""
    return secrets.token_hex(32)


def write_token(folder: Path) -> Path:
    """The file with the token, which only this user can read."""
    path = folder / "token"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(_token())
    return path


def is_noted(folder: Path, name: str) -> bool:
    """Whether another node has put a file of that name into `folder`, or removed the folder.

    NFS may go on denying a file for a minute that it has denied once; the folder's list it reads anew.
    """
    try:
        return name in os.listdir(folder)
    except FileNotFoundError:
        return True


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL to those that still run, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def without_client_server(parameters: Any, _head: bool) -> None:
    """Ray's own hook: no server for `ray://` clients, whose fixed port two users of a node would both want."""
    parameters.ray_client_server_port = None


def place(
    slot: Callable[[], None], slots: int, parallel: int, resources: Mapping[str, float], folder: Path, trials_of_a_slot: int = 1
) -> list[str]:
    """Have Ray Tune run `slot` so often, at most `parallel` at once; one whose process dies costs that slot alone. Returns their errors.

    Its place is taken by a new one at once, which finds the trial on the same node, and on another one once the round is over.
    Tune's own files go into `folder`, which all nodes see; they are never read back.
    """
    from ray import tune

    def one(_config: dict[str, int]) -> None:
        slot()

    tuner = tune.Tuner(
        tune.with_resources(one, dict(resources)),
        param_space={"slot": tune.grid_search(list(range(slots)))},
        # Reused actors import torch once and not once a slot.
        tune_config=tune.TuneConfig(max_concurrent_trials=parallel, reuse_actors=True),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=str(folder / "tune"),
            failure_config=tune.FailureConfig(max_failures=_DEATHS * trials_of_a_slot),
            verbose=0,
        ),
    )
    with open(folder / "tune.log", "a") as log, contextlib.redirect_stdout(log):  # the sweep shows its own table
        return [str(error).strip().splitlines()[-1] for error in tuner.fit().errors]
