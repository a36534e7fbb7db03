"""Coordinate the ranks of one worker: rank 0 claims a trial, and all train it."""

from collections.abc import Callable
from contextlib import ExitStack

from cnnjepa.run.folder import RunStatus
from cnnjepa.run.ranks import Ranks, broadcast_object
from jobs.cli import MOVED, STOPPED
from jobs.cluster import ClusterProfile, JobSpec, fit_to
from jobs.provenance import of_trial
from jobs.run import charged, run_job
from jobs.slurm.hangs import pointer, watched
from jobs.slurm.nodes import NodeFaultError
from sweeps.execution.bad_nodes import Place, is_reopened_left
from sweeps.execution.scheduler import judge, next_claim, probed_at_rungs
from sweeps.execution.worker import output_to, stopper
from sweeps.spec.sweep import Trial
from sweeps.state.claims import Ownership, SlurmStart
from sweeps.state.history import last_command
from sweeps.state.view import View


class WorkerOnRanks:
    """One worker with several ranks. Only rank 0 reads `view`."""

    def __init__(
        self, view: View, cluster: ClusterProfile, ranks: Ranks, stop: Callable[[], bool], driver: str, start: SlurmStart | None = None
    ) -> None:
        self.view, self.cluster, self.ranks, self.stop = view, cluster, ranks, stop
        self.driver, self.start = driver, start
        self.place = Place.of(view, start)
        self._owned: Ownership | None = None
        self._has_run = False  # a trial of its own, and not only what another job has left

    def run(self) -> int:
        """Run one trial, in a search one after another; return the exit status.

        It is 0 at the end, STOPPED if asked to stop, and MOVED if the node is at fault. A worker
        also takes up trials that others have lost to a bad node.
        """
        while True:
            self._owned = None
            chosen = broadcast_object(self._choose() if self.ranks.is_main else None, self.ranks)
            assert chosen is not None
            if isinstance(chosen, int):
                return chosen
            try:
                if not self._run_one(*chosen):
                    return STOPPED
            except NodeFaultError as error:
                print(error, flush=True)
                return MOVED

    def _choose(self) -> tuple[Trial, int] | int:
        """Return a trial and its attempt, or the exit status if there is nothing to run."""
        if self.stop():
            return STOPPED
        if not self.view.follow():
            print("the sweep searches another space now", flush=True)
            return 0
        # In a search, the worker that ends a trial begins what follows.
        if self._has_run and self.view.sweep.search is None and not is_reopened_left(self.view):
            return 0
        try:
            found = next_claim(self.view, self.driver, self.start, self.place)
        except NodeFaultError as error:
            print(error, flush=True)
            return MOVED
        if found is None:
            print("nothing is to begin now", flush=True)
            return 0
        trial, self._owned = found
        claim = self._owned.claim
        before = self.view.judged_claims(trial)[-1:]
        self._has_run |= not before or before[0].slurm is None or self.start is None or before[0].slurm.job == self.start.job
        print(f"trial {trial.signature}: {trial.name}, attempt {claim.attempt}, step {claim.step}", flush=True)
        return trial, claim.attempt

    def _run_one(self, trial: Trial, epoch: int) -> bool:
        """Run the trial; return False if asked to stop, else True, the same on every rank.

        Raise NodeFaultError, once the trial is released, if it is to run elsewhere.
        """
        fit_to(self.cluster, trial.config)
        folder, owned, moved_off = self.view.sweep.trial_dir(trial), self._owned, None
        spares = self.place.sparing(self.view, trial, epoch) if self.place else charged
        with ExitStack() as ours:
            if owned is not None:
                ours.enter_context(owned)
                ours.enter_context(output_to(folder, epoch))
                ours.enter_context(of_trial(trial.overrides, last_command(self.view.sweep.path)))
                if self.start is not None:
                    ours.enter_context(watched(pointer(self.view.sweep.path, self.start.job), folder, epoch))
            try:
                should_stop = self.stop if owned is None else stopper(owned, self.stop)
                job = JobSpec(probed_at_rungs(self.view.sweep, trial), self.cluster, folder)
                result = run_job(job, should_stop, epoch, judge(self.view, trial), spares)
                ended = result is not None
                if self.place and owned and result is not None and result.status is not RunStatus.failed:
                    self.place.nodes.works(self.place.here, owned.claim.time)
            except NodeFaultError as error:
                moved_off, ended = error, False
        if moved_off is not None:
            raise moved_off
        # The first rank to exit with an error ends the others: rank 0 must have saved before.
        moved = broadcast_object(owned is not None and owned.lost() and not self.stop(), self.ranks)
        return bool(ended or moved)
