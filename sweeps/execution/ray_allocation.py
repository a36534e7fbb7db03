"""Drive an allocation: Ray Tune places workers in the job's own Ray cluster.

    python -m sweeps.execution.ray_allocation SUBMISSION FOLDER

The exit status is 0 if nothing is left to begin, 200 if asked to stop and all workers have saved;
any other is a death. FOLDER is private and visible to all nodes. It holds Ray's address and token,
and the file `stop`, at which all workers save and return.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from cnnjepa.run.files import write_atomic
from jobs.cli import STOPPED, Stop, stop_on_signals
from jobs.slurm.nodes import Nodes
from jobs.slurm.queue import own_job
from sweeps.execution.bad_nodes import reopen
from sweeps.execution.hung_workers import HungWorkers, tell_node
from sweeps.execution.phases import saving
from sweeps.execution.ray_tune import ENVIRONMENT, is_noted, place, signals_kept
from sweeps.execution.rounds import run_round
from sweeps.execution.watcher import Watcher
from sweeps.search.search import is_over
from sweeps.state.claims import Claim, SlurmStart
from sweeps.state.folder import Sweep
from sweeps.state.submission import Submission
from sweeps.state.view import View, slurm_queue

_SHOW_SECONDS = 10.0


class AllocationEngine:
    """Places workers with Ray Tune on the nodes of this job until all have returned."""

    def __init__(self, submission: Submission, sweep: Sweep, folder: Path) -> None:
        assert submission.allocation is not None
        self.submission, self.sweep, self.folder, self.workers = submission, sweep, folder, submission.allocation.workers
        self.total = submission.allocation.nodes  # all that there is to choose from
        self.nodes = Nodes(sweep.nodes.folder, self.total)
        start = self.start_of(submission)
        # A worker's death while this Ray cluster lives is the trial's fault; a death with it is
        # not.
        self.driver = f"{start.driver} ray {folder.name}"

    @staticmethod
    def start_of(submission: Submission) -> SlurmStart:
        """Return this process's part of the job: the share of one worker."""
        gpus = submission.worker_profile.gpus_per_trial
        start = SlurmStart.me(gpus, submission.log_of_this_job(), submission.code, shared=True)
        assert start is not None, "an allocation is a Slurm job"
        return start

    def stop(self) -> None:
        """Ask all workers, on every node, to save and return."""
        if not self.stopping():
            write_atomic(self.folder / "stop", "")

    def stopping(self) -> bool:
        """Return whether all workers were asked to return: by us, or by a node whose Ray ended."""
        return is_noted(self.folder, "stop")

    def end(self, claim: Claim) -> None:
        """End the process that holds `claim`, on whichever node it is."""
        if claim.slurm is not None:
            tell_node(self.folder, claim.slurm.node, claim.owner.pid)

    def connect(self) -> None:
        """Join the Ray cluster on this node."""
        # If the head is gone, waiting is useless: the supervisor starts another.
        os.environ |= {**ENVIRONMENT, "RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
        import ray

        address = (self.folder / "address").read_text()
        host = address.rpartition(":")[0]
        # A signal that arrives meanwhile is handled afterwards.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        with signals_kept():
            ray.init(address=address, _node_ip_address=host, log_to_driver=False, logging_level=logging.ERROR)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def mark_dead(self, view: View) -> None:
        """Mark dead every owner in this job. Call this between rounds, when none of them runs."""
        for trial in self.sweep.trials:
            last = next(iter(view.claims(trial)[-1:]), None)
            if last is not None and last.slurm is not None and last.slurm.job == own_job():
                view.watch.mark_dead(self.sweep.trial_dir(trial), last)

    def place(self, workers: int, silent: frozenset[Path]) -> list[str]:
        """Run `workers` workers, at most the allocation's number at once; return their errors."""
        submission, sweep, folder, driver, total = self.submission, self.sweep, self.folder, self.driver, self.total

        def worker() -> None:
            from sweeps.execution.worker import run_worker  # the driver itself needs no torch

            start = AllocationEngine.start_of(submission)
            run_worker(sweep, submission.worker_profile, driver, lambda: is_noted(folder, "stop"), silent, start, total)

        share = submission.worker_profile
        trials = sweep.search.max_trials * sweep.search.seeds if sweep.search else 1
        resources = {"cpu": share.cores_per_trial, "gpu": share.gpus_per_trial}
        return place(worker, workers, self.workers, resources, folder, trials, sorted(self.nodes.avoided()))


class HandOn:
    """Passes signals on to the workers, and logs the sweep's state now and then."""

    def __init__(self, stop: Stop, engine: AllocationEngine, watcher: Watcher, hung: HungWorkers | None = None) -> None:
        self.stop, self.engine, self.watcher, self._hung = stop, engine, watcher, hung
        self._shown = float("-inf")

    def show(self) -> None:
        """Check for signals and for runs that hang, and show the state."""
        if self.stop():
            self.engine.stop()
            self.watcher.enter(saving(self.watcher.view))
        for line in self._hung.look(self.watcher.view) if self._hung else ():
            self.watcher.say(line)
        if time.monotonic() - self._shown > _SHOW_SECONDS:
            self.watcher.show()
            self._shown = time.monotonic()


def drive(submission: Submission, folder: Path, stop: Stop) -> int:
    """Place workers until nothing is left to begin; return the exit status."""
    sweep = Sweep.load(submission.sweep_path)
    engine = AllocationEngine(submission, sweep, folder)
    view = View(sweep, queue=slurm_queue(sweep))
    engine.connect()
    import ray

    # This is the job's log.
    console = Console(file=sys.stdout, width=150, markup=False, force_terminal=False)
    with Watcher(view, console, engine.workers) as watcher:
        look = HandOn(stop, engine, watcher, HungWorkers(engine.driver, engine.end, engine.nodes))
        try:
            while True:
                look.show()
                if engine.stopping() or is_over(view):
                    break
                engine.mark_dead(view)
                reopen(view, engine.nodes)
                if not run_round(view, engine.place, engine.workers, look.show, engine.stopping):
                    break  # the rest runs elsewhere: free these nodes for others
        finally:
            ray.shutdown()
    if stop():
        return STOPPED
    return 1 if engine.stopping() else 0


def main() -> None:
    """Run the command line."""
    with stop_on_signals() as stop:
        status = drive(Submission.load(Path(sys.argv[1])), Path(sys.argv[2]), stop)
        sys.stdout.flush()
        # Exit here: a signal during Python's shutdown would make a completed run look stopped.
        os._exit(status)


if __name__ == "__main__":
    main()
