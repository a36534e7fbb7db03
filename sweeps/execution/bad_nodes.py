"""Keep trials from paying for faults of nodes: see jobs/slurm/nodes.py for what counts as one."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cnnjepa.run.attempts import newest
from cnnjepa.run.files import tail
from cnnjepa.run.folder import RunStatus
from cnnjepa.run.ranks import rank_count
from jobs.slurm.clients import hosts
from jobs.slurm.nodes import Fault, FaultKind, NodeFaultError, Nodes, blamed_nodes, is_aftermath, points_to_node, this_node
from sweeps.spec.sweep import Trial
from sweeps.state import claims
from sweeps.state.logs import log_tail
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

_LOG_BYTES = 20_000


@dataclass(frozen=True)
class Place:
    """The nodes that a worker runs on, and what is known of all nodes."""

    nodes: Nodes
    here: list[str]
    start: claims.SlurmStart

    @staticmethod
    def of(view: View, start: claims.SlurmStart | None, total: int = 0) -> "Place | None":
        """Return the place of this process in Slurm, else None.

        `total` is the number of nodes of an allocation, on one of which the worker runs; 0 for an
        array, of which a worker has all nodes of its job.
        """
        if start is None:
            return None
        here = [] if total else hosts(os.environ.get("SLURM_JOB_NODELIST", ""))
        return Place(Nodes(view.sweep.path / "nodes", total), here or [this_node()], start)

    def require_sound(self, view: View) -> None:
        """Reopen what bad nodes have failed; raise NodeFaultError if this is one of them."""
        reopen(view, self.nodes)
        if bad := sorted(self.nodes.avoided().keys() & set(self.here)):
            raise NodeFaultError(f"nothing begins on node {', '.join(bad)}, which is avoided")

    def sparing(self, view: View, trial: Trial, attempt: int) -> Callable[[str], bool]:
        """Return the function that records why a rank failed, and says whether its node is at fault.

        With several ranks it always says no: the next start decides.
        """
        rank = int(os.environ.get("RANK", "0"))

        def spares(cause: str) -> bool:
            alone = rank_count() == 1
            if alone or not is_aftermath(cause):
                self._record(trial, attempt, [this_node()], FaultKind.error, cause, rank)
            if not alone:
                return False
            reopen(view, self.nodes)
            return not self.nodes.is_charged(trial.signature)

        return spares

    def note_death(self, view: View, trial: Trial, past: list[claims.Claim], step: int, driver: str) -> None:
        """Record that the last owner died here, unless one of its ranks has said why.

        One death may be an accident. It counts if its text points to the node, if another trial has
        failed here, or if the trial dies again without gaining a step.
        """
        folder, last = view.sweep.trial_dir(trial), past[-1]
        deaths = claims.crashes_in_place(past, step, driver, folder)
        if last.slurm is None or not deaths or self.nodes.has(trial.signature, last.attempt):
            return
        log = log_of(folder, last)
        said, cause = tail(log, _LOG_BYTES).decode(errors="replace") if log.exists() else "", log_tail(log) or "its process died"
        nodes = blamed_nodes(said, hosts(last.slurm.node))
        others = {node for f in self.nodes.live() if f.trial != trial.signature for node in f.nodes}
        if deaths > 1 or points_to_node(cause) or others & set(nodes):
            self._record(trial, last.attempt, nodes, FaultKind.death, cause, 0)

    def _record(self, trial: Trial, attempt: int, nodes: list[str], kind: FaultKind, cause: str, rank: int) -> None:
        kind = FaultKind.node if points_to_node(cause) else kind
        self.nodes.record(Fault(trial.signature, attempt, self.start.job, nodes, kind, cause, time.time()), rank)


def log_of(folder: Path, claim: claims.Claim) -> Path:
    """Return the log that says why the owner of `claim` died."""
    own = claim.slurm if claim.slurm and not claim.slurm.shared else None
    return own.output(folder.parent.parent) if own else newest(folder / "log" / "train.log")


def reopen(view: View, nodes: Nodes) -> None:
    """Let failed trials run again whose faults are, by what is known now, those of avoided nodes."""
    faulted = {f.trial for f in nodes.live()}
    again = False
    for trial in view.sweep.trials if faulted else ():
        if trial.signature not in faulted or nodes.is_charged(trial.signature):
            continue
        run, folder = view.sweep.run(trial), view.sweep.trial_dir(trial)
        result = run.result()
        if result is not None and result.status is RunStatus.failed and nodes.has(trial.signature, result.claim):
            run.set_aside(RunStatus.failed)
            if not claims.is_cancelled(folder):
                claims.uncancel(folder)  # forgives the deaths
            again = True
    if again:
        nodes.touch()
        view.look_again()


def is_reopened_left(view: View) -> bool:
    """Return whether a trial that failed on a bad node waits for any worker to take it up."""
    faulted = {f.trial for f in view.sweep.nodes.live()}
    view.look_again()
    return any(t.signature in faulted and view.state(t) is TrialState.interrupted for t in view.sweep.trials)
