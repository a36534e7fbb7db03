"""Submit one array of workers exactly once, however often Slurm has to be asked."""

import contextlib
import time

from jobs.cluster import ClusterProfile
from jobs.slurm.queue import Queue, SlurmError, SlurmSilentError
from jobs.slurm.refusals import is_full, is_refusal, may_pass
from jobs.slurm.sbatch import submit
from sweeps.state.submission import Submission

# An absent controller is waited for; words that are no known refusal are worth a few tries.
_PATIENCE_SECONDS, _UNKNOWN_TRIES = 300.0, 3
_PAUSE_SECONDS, _LOOK_SECONDS = 3.0, 120.0


class QueueFullError(SlurmError):
    """No more jobs may be queued until others have ended; the message has Slurm's words."""

    def __init__(self, said: str, size: int = 0) -> None:
        """`size` is that of the array that was refused, or 0 if none was tried."""
        super().__init__(said)
        self.size = size


def submit_once(wanted: Submission, profile: ClusterProfile, queue: Queue) -> None:
    """Submit `wanted`, whose file was just created, by `profile`, and record its job ID.

    Raise SlurmError with sbatch's words if it is refused, QueueFullError if only for now. Nothing
    is queued then. Raise SlurmSilentError if Slurm does not say whether it is; the submission then
    stays open, and the next command settles it.
    """
    deadline, tries = time.monotonic() + _PATIENCE_SECONDS, 0
    while True:
        queue.expect(wanted.name)
        try:
            wanted.write_job(submit(profile, wanted.array()))
            return
        except SlurmError as error:
            said = str(error)
        if is_refusal(said):
            wanted.write_void(is_full(said))
            raise QueueFullError(said, wanted.size) if is_full(said) else SlurmError(said)
        # The job may exist all the same if only sbatch's answer was lost.
        if _adopted(wanted, queue, max(deadline, time.monotonic() + _LOOK_SECONDS)):
            return
        tries += 1
        if time.monotonic() > deadline or (tries >= _UNKNOWN_TRIES and not may_pass(said)):
            wanted.write_void()
            raise SlurmError(said)


def _adopted(wanted: Submission, queue: Queue, deadline: float) -> bool:
    """Return whether the job is queued, and record it; return False once it is sure that it is not.

    Raise SlurmSilentError if Slurm has not said it by the deadline.
    """
    while True:
        queue.look_again()
        with contextlib.suppress(SlurmError):
            if found := wanted.listed(queue):
                wanted.write_job(found.array)
                return True
            if queue.is_gone(wanted.name):
                return False
        if time.monotonic() > deadline:
            raise SlurmSilentError(f"squeue: no answer that shows whether {wanted.name} is queued; run the command again to settle it")
        time.sleep(_PAUSE_SECONDS)
