"""States of a trial, and the state that the standing of a claim's owner gives it."""

from enum import Enum

from sweeps.state import claims


class TrialState(Enum):
    """State of a trial."""

    waiting = "waiting"
    running = "running"
    requeued = "requeued"  # waits for its own Slurm job to start again
    interrupted = "interrupted"  # has begun; any worker may resume it
    cancelled = "cancelled"  # until a person runs the sweep again
    completed = "completed"
    pruned = "pruned"
    failed = "failed"
    damaged = "damaged"  # a file of its folder cannot be read: a person restores or deletes it

    @property
    def ended(self) -> bool:
        """Return whether nothing is left to run."""
        return self in (TrialState.completed, TrialState.pruned, TrialState.failed, TrialState.damaged)

    @property
    def final(self) -> bool:
        """Return whether nothing changes it but a command that tries the trial again."""
        return self.ended and self is not TrialState.damaged

    @property
    def settled(self) -> bool:
        """Return whether nothing more happens unless a person acts."""
        return self.ended or self is TrialState.cancelled


OF_STANDING = {
    claims.Standing.alive: TrialState.running,
    claims.Standing.requeued: TrialState.requeued,
    claims.Standing.cancelled: TrialState.cancelled,
    claims.Standing.dead: TrialState.interrupted,
}
