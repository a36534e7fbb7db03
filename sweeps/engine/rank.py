"""`python -m sweeps.engine.rank SUBMISSION`: one rank of a slot in a Slurm job; rank 0 claims a trial, all ranks train it.

Exit status 0 where the trial has ended or none was left, 200 where the run was told to stop and has saved; anything else is a death.
"""

import math
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from jobs.door import STOPPED, Stop, stop_on_signals


def run_rank(submission_file: Path, stop: Stop) -> int:
    """Run this rank's part of one slot; returns the exit status, the same on every rank."""
    # Imported when signals are caught already: one that came during the seconds that torch takes would end the process.
    from cnnjepa.config import Device
    from cnnjepa.distributed import broadcast_object, joined
    from cnnjepa.train import HopelessError, RunError
    from jobs.queue import Queue, has_slurm
    from jobs.ranks import adopt_srun_ranks
    from jobs.run import run_job
    from jobs.spec import JobSpec, fit_to
    from sweeps.choice import judge, next_claim
    from sweeps.claims import Ownership, SlurmStart
    from sweeps.engine.submission import Submission
    from sweeps.folder import Sweep, View
    from sweeps.slot import output_to, stopper
    from sweeps.spec import Trial

    adopt_srun_ranks()
    submission = Submission.load(submission_file)
    sweep, cluster = Sweep.load(submission.sweep_path), submission.cluster
    queue = Queue(refresh_seconds=60, patience_seconds=600) if has_slurm() else None  # a container may lack Slurm's commands
    view = View(sweep, queue=queue, remember_seconds=math.inf)  # rank 0 alone looks
    owned: Ownership | None = None

    def choose() -> tuple[Trial, int] | int:
        """A trial and the epoch of its claim, or the exit status where there is none to run."""
        nonlocal owned
        # A slot of a search takes one trial after the other: what becomes of its job is not what becomes of each of them.
        many = view.sweep.search is not None
        start = SlurmStart.me(int(cluster.gpus_per_slot), submission.log_of_this_job(), submission.code, shared=many)
        assert start is not None, "a rank runs in a Slurm job"
        if stop():
            return STOPPED
        if not view.follow():
            print("the sweep searches another space now", flush=True)
            return 0
        found = next_claim(view, start.driver, start)
        if found is None:
            print("nothing is to begin now", flush=True)
            return 0
        trial, owned = found
        print(
            f"trial {trial.signature}: {trial.setting}, seed {trial.seed}, claim {owned.claim.epoch}, step {owned.claim.step}", flush=True
        )
        return trial, owned.claim.epoch

    def run_one(trial: Trial, epoch: int) -> bool:
        """Whether the trial has ended, or is no longer ours; False where the run was told to stop. The same on every rank."""
        fit_to(cluster, trial.config)
        folder = view.sweep.trial_dir(trial)
        with ExitStack() as ours:
            if owned is not None:
                ours.enter_context(owned)
                ours.enter_context(output_to(folder / "log" / "train.log"))
            try:
                should_stop = stop if owned is None else stopper(owned, stop)
                ended = run_job(JobSpec(trial.config, cluster, folder), should_stop, epoch, judge(view, trial)) is not None
            except RunError as error:
                if not isinstance(error.__cause__, HopelessError):
                    raise
                ended = True  # every rank saw it, and it is recorded
        # The first rank to leave with a status ends the others: none may before rank 0 has saved and released its claim.
        moved = broadcast_object(owned is not None and owned.lost() and not stop(), ranks)
        return bool(ended or moved)

    with joined(cluster.device if cluster.gpus_per_slot else Device.cpu) as ranks:
        while True:
            owned = None
            chosen = broadcast_object(choose() if ranks.is_main else None, ranks)
            assert chosen is not None
            if isinstance(chosen, int):
                return chosen
            if not run_one(*chosen):
                return STOPPED
            if view.sweep.search is None:
                return 0  # what a trial's end brings about in a search is begun by the slot that ended it


def main() -> None:
    """The door; srun starts one for each rank."""
    with stop_on_signals() as stop:
        status = run_rank(Path(sys.argv[1]), stop)
        sys.stdout.flush()
        # From within the block: a signal that comes while Python takes itself down would make a completed run look like a stopped one.
        os._exit(status)


if __name__ == "__main__":
    main()
