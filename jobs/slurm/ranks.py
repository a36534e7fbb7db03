"""Pass srun's ranks to the trainer in torchrun's variables; the trainer knows no Slurm."""

import os
import subprocess
from collections.abc import MutableMapping

# Slurm, Ray and ephemeral sockets leave these ports alone on an ordinary Linux.
_FIRST_PORT, _PORTS = 21000, 8000


def adopt_srun_ranks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables in a Slurm step of several tasks, unless RANK is already set."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or "SLURM_PROCID" not in environment or tasks == "1":
        return
    nodes = environment["SLURM_STEP_NODELIST"]
    if "[" in nodes or "," in nodes:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=60, check=True)
        nodes = listed.stdout.split()[0]
    # Keep consecutive steps of one job, and jobs that share a node, on different ports.
    offset = int(environment["SLURM_JOB_ID"]) * 16 + int(environment.get("SLURM_STEP_ID", "0"))
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = tasks
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["MASTER_ADDR"] = nodes
    environment["MASTER_PORT"] = str(_FIRST_PORT + offset % _PORTS)
