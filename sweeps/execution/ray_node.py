"""Run Ray on one node of an allocation, until FOLDER/end exists.

    python -m sweeps.execution.ray_node head|worker SUBMISSION FOLDER

FOLDER is private and visible to all nodes. The head writes Ray's address into it. A node whose Ray
ends by itself writes `stop`, at which all workers save. Slurm's signals are for the driver; Ray's
processes start with them blocked, since Ray would end workers that still save.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from cnnjepa.run.files import write_atomic
from jobs.cli import STOP_SIGNALS
from jobs.slurm.nodes import this_node
from sweeps.execution.hung_workers import end_told
from sweeps.execution.ray_tune import ENVIRONMENT, NODE_LABEL, OBJECT_STORE_BYTES, is_noted, kill, private_folder
from sweeps.state.submission import Submission

_LOOK_SECONDS = 0.3
_TAIL_CHARACTERS = 3000
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None)


def environment(submission: Submission) -> dict[str, str]:
    """Return the environment of Ray's processes, workers included."""
    return {
        **ENVIRONMENT,
        "OMP_NUM_THREADS": str(submission.worker_profile.threads_per_rank),
        "RAY_START_HOOK": "sweeps.execution.ray_tune.without_client_server",
        # Otherwise one process per core waits with 100 MB for tasks that never come.
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
    }


def command(submission: Submission, role: str, temporary: Path, address: str) -> list[str]:
    """Return the `ray start` command. The kernel picks free ports, so that users do not collide."""
    allocation, worker = submission.allocation, submission.worker_profile
    assert allocation is not None
    own_address = socket.gethostbyname(os.environ.get("SLURMD_NODENAME", socket.gethostname()))
    ports = ["node-manager", "object-manager", "min-worker", "max-worker", "dashboard-agent-listen", "dashboard-agent-grpc"]
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", "--include-log-monitor=false"),
        *(["--head", "--port=0", "--include-dashboard=false", "--no-monitor"] if role == "head" else [f"--address={address}"]),
        *(f"--{name}-port=0" for name in [*ports, "runtime-env-agent", "metrics-export"]),
        f"--node-ip-address={own_address}",
        f"--labels={NODE_LABEL}={this_node()}",
        f"--num-cpus={allocation.workers_per_node * worker.cores_per_trial}",
        f"--num-gpus={submission.cluster.gpus_per_node}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        # Ray opens this folder to everybody; the one around it is private
        f"--temp-dir={temporary / 'ray'}",
    ]


def run_node(role: str, submission: Submission, folder: Path, temporary: Path) -> int:
    """Run Ray until `folder` holds `end`; return the exit status, 1 if Ray ended by itself."""
    # Orphans of Ray's processes become our children, so that we can end them.
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    address = "" if role == "head" else (folder / "address").read_text()
    current, log = temporary / "ray" / "ray_current_cluster", temporary / "start.log"
    published = role != "head"
    with open(log, "wb") as output:
        ray = subprocess.Popen(
            command(submission, role, temporary, address),
            env={**os.environ, **environment(submission)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
        )
    while ray.poll() is None and not is_noted(folder, "end"):
        if not published and current.exists() and (found := current.read_text().strip()):
            write_atomic(folder / "address", found)
            published = True
        end_told(folder, this_node())
        time.sleep(_LOOK_SECONDS)
    died = ray.poll() is not None and not is_noted(folder, "end")
    while below := psutil.Process().children(recursive=True):
        kill(below)
    if died:
        print(f"{socket.gethostname()}: Ray has ended by itself: {log.read_text()[-_TAIL_CHARACTERS:]}", flush=True)
        write_atomic(folder / "stop", "")
    return int(died)


def main() -> int:
    """Run the command line."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    temporary = private_folder()
    try:
        return run_node(sys.argv[1], Submission.load(Path(sys.argv[2])), Path(sys.argv[3]), temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
