"""Stands in for a node's Python where trials shall cost nothing: claims as a rank does, writes a result, releases, and imports no torch.

A process that imports torch takes 0.5 GB here, and 64 of them do not fit this machine. All else is as in an ordinary worker.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cnnjepa.run.folder import RunResult, RunStatus
from jobs.slurm.queue import Queue
from sweeps.execution import scheduler
from sweeps.state.claims import SlurmStart
from sweeps.state.folder import Sweep
from sweeps.state.submission import Submission
from sweeps.state.view import View

scheduler.runnable = lambda _trial: True  # building the configuration would import the method, and with it torch


def main() -> None:
    """The last argument is the submission, as for sweeps.execution.worker_main."""
    submission = Submission.load(Path(sys.argv[-1]))
    sweep = Sweep.load(submission.sweep_path)
    start = SlurmStart.me(0, submission.log_of_this_job(), submission.code)
    assert start is not None
    found = scheduler.next_claim(View(sweep, queue=Queue(refresh_seconds=60, patience_seconds=600)), start.driver, start)
    if found is not None:
        trial, owned = found
        with owned:
            sweep.run(trial).write_result(RunResult(RunStatus.completed, metrics={sweep.objective: 0.0}, claim=owned.claim.attempt))
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
