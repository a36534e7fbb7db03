"""`python -m sweeps.execution.worker_main SUBMISSION`: one rank of a slot in a Slurm job; rank 0 claims a trial, all ranks train it.

Exit status 0 where the trial has ended or none was left, 200 where the run was told to stop and has saved; anything else is a death.
"""

import math
import os
import sys
from pathlib import Path

from jobs.cli import Stop, stop_on_signals


def run_rank(submission_file: Path, stop: Stop) -> int:
    """Run this rank's part of one slot; returns the exit status, the same on every rank."""
    # Imported when signals are caught already: one that came during the seconds that torch takes would end the process.
    from cnnjepa.config import Device
    from cnnjepa.distributed import joined
    from jobs.slurm.queue import Queue, has_slurm
    from jobs.slurm.ranks import adopt_srun_ranks
    from sweeps.execution.worker_ranks import SlotOnRanks
    from sweeps.state.claims import SlurmStart
    from sweeps.state.folder import Sweep, View
    from sweeps.state.submission import Submission

    adopt_srun_ranks()
    submission = Submission.load(submission_file)
    sweep, cluster = Sweep.load(submission.sweep_path), submission.cluster
    queue = Queue(refresh_seconds=60, patience_seconds=600) if has_slurm() else None  # a container may lack Slurm's commands
    view = View(sweep, queue=queue, remember_seconds=math.inf)
    # A slot of a search takes one trial after the other: what becomes of its job is not what becomes of each of them.
    many = sweep.search is not None
    start = SlurmStart.me(int(cluster.gpus_per_slot), submission.log_of_this_job(), submission.code, shared=many)
    assert start is not None, "a rank runs in a Slurm job"
    with joined(cluster.device if cluster.gpus_per_slot else Device.cpu) as ranks:
        return SlotOnRanks(view, cluster, ranks, stop, start.driver, start).run()


def main() -> None:
    """The door; srun starts one for each rank."""
    with stop_on_signals() as stop:
        status = run_rank(Path(sys.argv[1]), stop)
        sys.stdout.flush()
        # From within the block: a signal that comes while Python takes itself down would make a completed run look like a stopped one.
        os._exit(status)


if __name__ == "__main__":
    main()
