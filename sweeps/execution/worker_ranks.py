"""Coordinate the ranks of one worker: rank 0 claims a trial, and all train it."""

from collections.abc import Callable
from contextlib import ExitStack

from cnnjepa.run.ranks import Ranks, broadcast_object
from jobs.cli import STOPPED
from jobs.cluster import ClusterProfile, JobSpec, fit_to
from jobs.run import run_job
from sweeps.execution.scheduler import judge, next_claim
from sweeps.execution.worker import output_to, stopper
from sweeps.spec.sweep import Trial
from sweeps.state.claims import Ownership, SlurmStart
from sweeps.state.folder import View


class WorkerOnRanks:
    """One worker with several ranks. Only rank 0 reads `view`."""

    def __init__(
        self, view: View, cluster: ClusterProfile, ranks: Ranks, stop: Callable[[], bool], driver: str, start: SlurmStart | None = None
    ) -> None:
        self.view, self.cluster, self.ranks, self.stop = view, cluster, ranks, stop
        self.driver, self.start = driver, start
        self._owned: Ownership | None = None

    def run(self) -> int:
        """Run one trial, in a search one after another; return 0, or STOPPED if asked to stop."""
        while True:
            self._owned = None
            chosen = broadcast_object(self._choose() if self.ranks.is_main else None, self.ranks)
            assert chosen is not None
            if isinstance(chosen, int):
                return chosen
            if not self._run_one(*chosen):
                return STOPPED
            if self.view.sweep.search is None:
                return 0  # in a search, the worker that ends a trial begins what follows

    def _choose(self) -> tuple[Trial, int] | int:
        """Return a trial and its attempt, or the exit status if there is nothing to run."""
        if self.stop():
            return STOPPED
        if not self.view.follow():
            print("the sweep searches another space now", flush=True)
            return 0
        found = next_claim(self.view, self.driver, self.start)
        if found is None:
            print("nothing is to begin now", flush=True)
            return 0
        trial, self._owned = found
        claim = self._owned.claim
        print(f"trial {trial.signature}: {trial.label}, seed {trial.seed}, attempt {claim.attempt}, step {claim.step}", flush=True)
        return trial, claim.attempt

    def _run_one(self, trial: Trial, epoch: int) -> bool:
        """Run the trial; return False if asked to stop, else True, the same on every rank."""
        fit_to(self.cluster, trial.config)
        folder, owned = self.view.sweep.trial_dir(trial), self._owned
        with ExitStack() as ours:
            if owned is not None:
                ours.enter_context(owned)
                ours.enter_context(output_to(folder, epoch))
            should_stop = self.stop if owned is None else stopper(owned, self.stop)
            ended = run_job(JobSpec(trial.config, self.cluster, folder), should_stop, epoch, judge(self.view, trial)) is not None
        # The first rank to exit with an error ends the others: rank 0 must have saved before.
        moved = broadcast_object(owned is not None and owned.lost() and not self.stop(), self.ranks)
        return bool(ended or moved)
