"""Submit from inside a job what it leaves: `python -m sweeps.execution.successor SUBMISSION ...`.

The supervisor runs this when a trial has ended (`--ended-since SECONDS`), and when the run was
stopped in a job that Slurm does not requeue (`--stopped`). It submits the workers that the sweep
lacks, as the watching command does, so that no command has to watch. The exit status is AGAIN if a
trial is left that no job can be queued for: the job runs its command once more. Else it is 0.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

from jobs.cli import STOP_SIGNALS, Parser, exit_status
from jobs.slurm.queue import Queue, SlurmError, own_job, own_restart
from jobs.slurm.supervisor import AGAIN, say
from sweeps.execution.slurm_array import RacedError, SlurmEngine
from sweeps.execution.submitting import QueueFullError
from sweeps.search.search import is_over
from sweeps.state.folder import Sweep
from sweeps.state.submission import Submission
from sweeps.state.view import View

# The job holds its nodes meanwhile.
_LONGEST_SECONDS, _PAUSE_SECONDS = 45.0, 2.0


def has_claimed(view: View, since: float) -> bool:
    """Return whether this start of the job has claimed a trial since then, by this node's clock."""
    starts = [(c.slurm, c.time) for t in view.sweep.trials for c in view.claims(t)[-1:] if c.slurm]
    return any((s.job, s.restart) == (own_job(), own_restart()) and at >= since for s, at in starts)


def submit_rest(engine: SlurmEngine, stopped: bool, longest_seconds: float = _LONGEST_SECONDS) -> int:
    """Submit what the sweep lacks beside this job; return AGAIN if this job should go on itself."""
    deadline = time.monotonic() + longest_seconds
    while True:
        engine.queue.look_again()
        try:
            view = View(engine.sweep, queue=engine.queue)
            missing = engine.missing(view) - engine.given_up(view)
            if missing <= 0:
                return 0
            # Where the limit is not known, each job that ends tries one more.
            few = engine.room() is None and any(s.was_full for s in Submission.all_of(engine.sweep))
            for made in engine.submit(1 if few or stopped else missing, all_of_it=stopped):
                say(f"submitted job {made.job}: {made.what}")
            return 0
        except RacedError:
            engine.unsettled(say)
        except QueueFullError as error:
            say(f"{missing} workers are not submitted yet: {error}")
            if not stopped:
                return AGAIN
        except SlurmError as error:
            say(f"no successor: {error}")
            if not stopped:
                return AGAIN
        if time.monotonic() > deadline:
            return 0 if stopped else AGAIN
        time.sleep(_PAUSE_SECONDS)


def run(asked: argparse.Namespace) -> int:
    """Do what the command line asks; return the exit status."""
    sweep = Sweep.load(Submission.load(asked.submission).sweep_path)
    queue = Queue(refresh_seconds=5.0, patience_seconds=20.0)
    view = View(sweep, queue=queue)
    if is_over(view) or not (asked.stopped or has_claimed(view, asked.ended_since)):
        return 0  # a worker that found nothing to claim has no successor either
    engine = SlurmEngine.of(sweep, queue)
    assert engine is not None, "this is a job of a submission"
    engine.leaving = own_job()
    return submit_rest(engine, asked.stopped)


def main() -> int:
    """Run the command line."""
    parser = Parser(prog="python -m sweeps.execution.successor", description="Submit what a job that ends leaves to do.")
    parser.add_argument("submission", type=Path, metavar="SUBMISSION")
    why = parser.add_mutually_exclusive_group(required=True)
    why.add_argument("--ended-since", type=float, metavar="SECONDS", help="a trial has ended; when its command was started")
    why.add_argument("--stopped", action="store_true", help="the run was stopped, and Slurm does not requeue the job")
    # Slurm may be ending the job already.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return exit_status(lambda: run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
