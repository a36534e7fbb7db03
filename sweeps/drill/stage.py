"""Host a drill's run on this machine, where its processes are killed.

    python -m sweeps.drill.stage RUNS_DIR RANKS [key=value ...]

A driver starts ranks and restarts them when they die, as jobs/slurm/supervisor.py does in a Slurm
job. All are forked from this process, which has imported torch, so a death costs 1 s, not 10 s.

Each line on standard input, a `Start` as JSON, starts a driver; the answer is its PID. At the end of
the input everything ends.
"""

import contextlib
import ctypes
import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from cnnjepa.run.ranks import Device, joined
from jobs.cli import stop_on_signals
from jobs.cluster import ClusterProfile
from sweeps.cli.plan import parse, plan
from sweeps.drill.sweep import SWEEP
from sweeps.execution.ray_tune import kill
from sweeps.execution.worker_ranks import WorkerOnRanks
from sweeps.state import claims
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep
from sweeps.state.view import View

_PAUSE_SECONDS = 0.2
_PR_SET_CHILD_SUBREAPER = 36
_CAPABILITIES_VERSION_3 = 0x20080522
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


@dataclass(frozen=True)
class Start:
    """What a driver and its ranks see."""

    clock_seconds: float = 0.0  # their clock is off by so much
    container: str = ""  # by its name they tell their processes from those of another container
    silent: str = ""  # a claim whose heartbeat has been silent for long enough


def respect_modes() -> None:
    """Give up root's exemption from file modes, for this process and its children."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION_3, 0)
    # Effective, permitted, inheritable; then the same for capabilities above 31.
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for i in range(3):
        sets[i] &= ~(1 << _CAP_DAC_OVERRIDE | 1 << _CAP_DAC_READ_SEARCH)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def set_clock(seconds: float) -> None:
    """Shift Python's clock in this process and its children. The machine's clock stays."""
    real = time.time
    time.time = lambda: real() + seconds


def set_container(name: str) -> None:
    """Let this process and its children live in a PID namespace of that name, as far as claims see."""
    claims._namespace = lambda: name


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def rank_main(sweep: Sweep, cluster: ClusterProfile, driver: Process, silent: frozenset[Path], rank: int, ranks: int, port: int) -> int:
    """Run one rank of a worker; return its exit status."""
    variables = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in variables.items()}
    with stop_on_signals() as stop, joined(Device.cpu) as joined_ranks:
        view = View(sweep, silent, remember_seconds=math.inf)
        return WorkerOnRanks(view, cluster, joined_ranks, lambda: stop() or not driver.lives(), driver.driver).run()


def forked(work: Callable[[], int]) -> int:
    """Fork a child that runs `work` and exits with its status; return the child's PID."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = work()
        sys.stdout.flush()
    finally:
        os._exit(status)


def drive(sweep: Sweep, cluster: ClusterProfile, ranks: int, silent: frozenset[Path]) -> int:
    """Start ranks until every trial has ended. As under srun, a failed rank ends the others."""
    me = Process.me()
    while not all(s.ended for s in View(sweep).states().values()):
        port = _free_port()
        left = {forked(partial(rank_main, sweep, cluster, me, silent, rank, ranks, port)) for rank in range(ranks)}
        while left:
            pid, status = os.wait()
            left.discard(pid)
            for other in left if status else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
        time.sleep(_PAUSE_SECONDS)
    return 0


def main() -> None:
    """Run the command line."""
    runs_dir, ranks = sys.argv[1], int(sys.argv[2])
    sweep, cluster = plan(SWEEP, parse(SWEEP, ["--runs-dir", runs_dir, *sys.argv[3:]]))
    sweep.write()
    for trial in sweep.trials:
        sweep.run(trial).prepare(trial.config)
    sweep.task.check([sweep.trials[0].config], ranks)  # what it imports is there for all children
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # ranks that outlive their driver are ours
    if os.geteuid() == 0:
        respect_modes()
    log = os.open(Path(runs_dir) / "stage.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    answers = os.dup(1)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.set_inheritable(answers, False)

    def drive_as(start: Start) -> int:
        os.close(0)
        os.close(answers)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if start.clock_seconds:
            set_clock(start.clock_seconds)
        if start.container:
            set_container(start.container)
        return drive(sweep, cluster, ranks, frozenset(map(Path, filter(None, [start.silent]))))

    def reap(_number: int, _frame: object) -> None:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    os.write(answers, f"{sweep.trial_dir(sweep.trials[0])}\n".encode())
    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        pid = forked(partial(drive_as, Start(**json.loads(line))))
        os.write(answers, f"{pid}\n".encode())
    kill(psutil.Process().children(recursive=True))


if __name__ == "__main__":
    main()
