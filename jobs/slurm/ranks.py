"""Pass srun's ranks to the trainer in torchrun's variables; the trainer knows no Slurm."""

import os
from collections.abc import MutableMapping

from jobs.slurm.clients import hosts

# Slurm, Ray and ephemeral sockets leave these ports alone on an ordinary Linux.
_FIRST_PORT, _PORTS = 21000, 8000


def adopt_srun_ranks(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables in a Slurm step of several tasks, unless RANK is already set."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or "SLURM_PROCID" not in environment or tasks == "1":
        return
    # Keep consecutive steps of one job, and jobs that share a node, on different ports.
    offset = int(environment["SLURM_JOB_ID"]) * 16 + int(environment.get("SLURM_STEP_ID", "0"))
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = tasks
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["MASTER_ADDR"] = hosts(environment["SLURM_STEP_NODELIST"])[0]
    environment["MASTER_PORT"] = str(_FIRST_PORT + offset % _PORTS)
