"""Workers of the real engine under a simulated clock and queue: claims, choices, rungs, results and folders are real, the training is not.

Each worker is a Slurm job that may be preempted: its owner is gone without a word, and some time later the job starts again and asks again.
"""

import heapq
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cnnjepa.run.folder import RunResult, RunStatus
from jobs.slurm.queue import Queue
from sweeps.execution.scheduler import judge, next_claim
from sweeps.spec.sweep import Trial
from sweeps.state import claims
from sweeps.state.claims import Process, SlurmStart
from sweeps.state.folder import Sweep
from sweeps.state.view import View

Curve = Callable[[Trial, int], float]  # the objective of a trial after so many epochs
_CLUSTER, _ARRAY = "simulated", "7"
_REQUEUE_EPOCHS = 0.5  # from a preemption until the job runs again, in the time of an epoch


class SimulatedQueue(Queue):
    """What Slurm would say of the workers' jobs."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[str, tuple[str, int]] = {}  # id -> state, restarts

    def state(self, job: str) -> str:
        """RUNNING or PENDING."""
        return self.jobs[job][0]

    def restarts(self, job: str) -> int | None:
        """How often it was preempted."""
        return self.jobs[job][1]


@dataclass
class Running:
    """A trial under way in a worker: where it is, and who owns it."""

    trial: Trial
    owned: claims.Ownership
    epoch: int
    verdict: Callable[[int, dict[str, float]], str]


@dataclass
class Simulation:
    """`workers` on one sweep; an epoch takes one unit of time, and the way to the next rung is lost with probability `preempted`."""

    sweep: Sweep
    curve: Curve
    workers: int
    random: random.Random
    preempted: float = 0.0
    waits: bool = True  # whether a worker that finds nothing to begin asks again after each end, as Ray's do; one of an array has ended
    cost: Callable[[], int] = lambda: 0  # what is noted beside the seconds of each choice, such as file operations so far
    epochs_trained: float = 0.0
    preemptions: int = 0
    resumed: int = 0
    now: float = 0.0
    decisions: list[tuple[int, float, int]] = field(default_factory=list)  # trials that had ended, seconds of a choice, its cost
    ended: int = 0
    longest_wait: float = 0.0  # of a preempted trial, until it went on

    def __post_init__(self) -> None:
        self.queue = SimulatedQueue()
        self.view = View(self.sweep, queue=self.queue, remember_seconds=float("inf"))
        self._busy: dict[int, Running] = {}
        self._lost: dict[str, float] = {}

    def run(self) -> Iterator[tuple[Trial, RunStatus]]:
        """Every end of a trial, in the order of the simulated clock, until the search is over."""
        before = Process.me
        Process.me = staticmethod(self._owner)  # type: ignore[method-assign]
        os.environ["SLURM_CLUSTER_NAME"] = _CLUSTER
        self._worker = 0
        try:
            yield from self._events()
        finally:
            Process.me = before  # type: ignore[method-assign]
            for name in ("SLURM_CLUSTER_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
                os.environ.pop(name, None)

    def _owner(self) -> Process:
        """The process of the worker whose turn it is, another after each preemption."""
        restarts = self.queue.jobs[self._job(self._worker)][1]
        return Process("node", "boot", "", self._worker * 100_000 + restarts, 0.0)

    @staticmethod
    def _job(worker: int) -> str:
        return f"{_ARRAY}_{worker}"

    def _events(self) -> Iterator[tuple[Trial, RunStatus]]:
        # Workers are not alike: else all of them would reach a rung in the same moment.
        order = itertools.count()
        events = [(self.random.random(), next(order), worker, "start") for worker in range(self.workers)]
        heapq.heapify(events)
        idle: list[int] = []
        self.queue.jobs = {self._job(worker): ("PENDING", -1) for worker in range(self.workers)}
        while events:
            self.now, _, worker, what = heapq.heappop(events)
            self._worker = worker
            os.environ |= {"SLURM_ARRAY_JOB_ID": _ARRAY, "SLURM_ARRAY_TASK_ID": str(worker)}
            job = self._job(worker)
            if what == "preempt":
                lost = self._busy.pop(worker)
                self.queue.jobs[job] = "PENDING", self.queue.jobs[job][1]
                self.preemptions += 1
                self._lost[lost.trial.signature] = self.now
                heapq.heappush(events, (self.now + _REQUEUE_EPOCHS, next(order), worker, "start"))
                continue
            if what == "start":
                self.queue.jobs[job] = "RUNNING", self.queue.jobs[job][1] + 1
            elif what == "reach":
                running = self._busy[worker]
                status = self._reach(running)
                if status is not None:
                    del self._busy[worker]
                    self.ended += 1
                    yield running.trial, status
                    for other in idle:  # what an end brings about may be begun by any worker
                        heapq.heappush(events, (self.now, next(order), other, "ask"))
                    idle.clear()
            running = self._busy.get(worker) or self._begin(worker)
            if running is None:
                idle += [worker] * self.waits
                continue
            leg = self._until(running) - running.epoch
            if self.random.random() < self.preempted:
                share = self.random.random()
                self.epochs_trained += share * leg
                heapq.heappush(events, (self.now + share * leg, next(order), worker, "preempt"))
            else:
                heapq.heappush(events, (self.now + leg, next(order), worker, "reach"))

    def _until(self, running: Running) -> int:
        """The next epoch at which something happens to the trial."""
        return next((e for e in self.sweep.rungs if e > running.epoch), running.trial.epochs)

    def _begin(self, worker: int) -> Running | None:
        """The worker's next trial; its folder and claim are real."""
        job = self._job(worker)
        start = SlurmStart(_CLUSTER, job, self.queue.jobs[job][1], "node", 0, "", "")  # no GPUs: the clock is simulated
        before, cost = time.perf_counter(), self.cost()
        got = next_claim(self.view, start.driver, start)
        self.decisions.append((self.ended, time.perf_counter() - before, self.cost() - cost))
        if got is None:
            return None
        trial, owned = got
        self.sweep.run(trial).prepare(trial.config)
        if (since := self._lost.pop(trial.signature, None)) is not None:
            self.resumed += 1
            self.longest_wait = max(self.longest_wait, self.now - since)
        self._busy[worker] = Running(trial, owned, owned.claim.step, judge(self.view, trial))
        return self._busy[worker]

    def _reach(self, running: Running) -> RunStatus | None:
        """Train to the next rung or to the end; the status of a trial that has ended there."""
        epoch = self._until(running)
        self.epochs_trained += epoch - running.epoch
        running.epoch = epoch
        trial, folder = running.trial, self.sweep.run(running.trial)
        metrics, cause = {self.sweep.objective: self.curve(trial, epoch)}, ""
        if epoch < trial.epochs:
            with open(folder.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"kind": "probe", "step": epoch, "epoch": float(epoch), **metrics}) + "\n")
            folder.checkpoints.mkdir(exist_ok=True)
            (folder.checkpoints / f"step-{epoch:09d}-{0:016x}.pt").touch()
            cause = running.verdict(epoch, metrics)
            if not cause:
                return None
        status = RunStatus.pruned if cause else RunStatus.completed
        probes = {str(e): {self.sweep.objective: self.curve(trial, e)} for e in self.sweep.rungs if e <= epoch}
        with running.owned:
            claim, final = running.owned.claim.attempt, {} if cause else metrics
            folder.write_result(RunResult(status, cause, final, probes=probes, step=epoch, device_hours=float(epoch), claim=claim))
        return status
