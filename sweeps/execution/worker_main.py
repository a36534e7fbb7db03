"""Run one rank of a worker in a Slurm job: rank 0 claims a trial, all ranks train it.

    python -m sweeps.execution.worker_main SUBMISSION

The exit status is 0 if the trial has ended or none was left, 200 if the run was asked to stop and
has saved. Any other status is a death.
"""

import math
import os
import sys
from pathlib import Path

from jobs.cli import ExitedError, Stop, line_of, stop_on_signals
from jobs.slurm.hangs import stacks_to


def run_rank(submission_file: Path, stop: Stop) -> int:
    """Run this rank's part of one worker; return the exit status, the same on every rank."""
    # Importing torch takes seconds: a signal meanwhile must not end the process.
    from cnnjepa.run.ranks import Device, joined
    from jobs.slurm.queue import Queue, has_slurm
    from jobs.slurm.ranks import adopt_srun_ranks
    from sweeps.execution.worker_ranks import WorkerOnRanks
    from sweeps.state.claims import SlurmStart
    from sweeps.state.folder import Sweep
    from sweeps.state.submission import Submission
    from sweeps.state.view import View

    adopt_srun_ranks()
    submission = Submission.load(submission_file)
    sweep, cluster = Sweep.load(submission.sweep_path), submission.cluster
    # A container may lack Slurm's commands.
    queue = Queue(refresh_seconds=60, patience_seconds=600) if has_slurm() else None
    view = View(sweep, queue=queue, remember_seconds=math.inf, thorough=False)
    # A search's worker takes one trial after another, so its job's fate is not that of each trial.
    many = sweep.search is not None
    start = SlurmStart.me(int(cluster.gpus_per_trial), submission.log_of_this_job(), submission.code, shared=many)
    assert start is not None, "a rank runs in a Slurm job"
    with joined(cluster.device if cluster.gpus_per_trial else Device.cpu) as ranks:
        return WorkerOnRanks(view, cluster, ranks, stop, start.driver, start).run()


def main() -> None:
    """Run the command line. srun starts one process per rank."""
    with stacks_to(sys.stderr), stop_on_signals() as stop:
        try:
            status = run_rank(Path(sys.argv[1]), stop)
        # A ValueError is about a file of the sweep. A program that exits has died, whatever its status: 0 and 200 have a meaning here.
        except (ValueError, ExitedError) as error:
            print(f"error: {line_of(error)}", file=sys.stderr, flush=True)
            status = 1
        sys.stdout.flush()
        # Exit here: a signal during Python's shutdown would make a completed run look stopped.
        os._exit(status)


if __name__ == "__main__":
    main()
