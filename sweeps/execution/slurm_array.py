"""Place workers in Slurm's queue: as tasks of throttled arrays, or by Ray in one allocation."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from jobs.cluster import Allocation, ClusterProfile
from jobs.slurm import queue as slurm
from jobs.slurm.nodes import hosts
from jobs.slurm.queue import Element, Queue, SlurmError
from jobs.slurm.sbatch import submit
from sweeps.search.search import trials_to_begin
from sweeps.state import claims
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep, TrialState, View
from sweeps.state.submission import Submission, job_prefix, last_number

# After the death of the command that called sbatch, sbatch may still run, or its job not be listed
# yet. A command on another host cannot be observed; it tries for at most the longer time.
_DEAD_WRITER_SECONDS, _FAR_WRITER_SECONDS = 10.0, 600.0
_MAX_ARRAY_SIZE = 1001  # Slurm's default
_SUBMIT_ATTEMPTS, _ATTEMPT_SECONDS = 8, 5.0


def _sbatch_lives(submission: Submission) -> bool:
    """Return whether an sbatch on this machine runs a script of submitit in the log folder."""
    lines = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    return any("sbatch" in line and any(w.startswith(str(submission.log_folder)) for w in line) for line in lines)


def shares(workers: int, limit: int, free: int) -> list[tuple[int, int]]:
    """Return (workers, maximum at once) of each array of at most `limit` tasks.

    All arrays together run `free` at once. Those past the first `free` wait for an earlier one.
    """
    count = -(-workers // limit)
    sizes = [workers // count + (i < workers % count) for i in range(count)]
    side_by_side = min(count, free)
    room = [free // side_by_side + (i < free % side_by_side) for i in range(side_by_side)]
    return [(size, min(size, room[i % side_by_side])) for i, size in enumerate(sizes)]


def array_limit() -> int:
    """Return the largest array size of this site, or Slurm's default if Slurm does not say."""
    with contextlib.suppress(SlurmError, ValueError):
        return int(slurm.controller_parameter("MaxArraySize"))
    return _MAX_ARRAY_SIZE


def off_bad_nodes(profile: ClusterProfile, sweep: Sweep) -> ClusterProfile:
    """Return the profile of a new job, which also excludes the nodes that the sweep avoids.

    Record first which nodes its jobs may use: at most a share of them is avoided.
    """
    own = str(profile.sbatch.get("exclude", ""))
    usable = slurm.nodes_of(profile.partition, str(profile.sbatch.get("nodelist", "")))
    sweep.nodes.know(sorted(set(usable) - set(hosts(own))), profile.nodes_per_trial)
    exclude = ",".join([*([own] if own else []), *sweep.nodes.avoided()])
    return replace(profile, sbatch={**profile.sbatch, "exclude": exclude}) if exclude else profile


class RacedError(RuntimeError):
    """Another command has submitted since `missing` was called. Nothing was submitted."""


class SlurmEngine:
    """Submits the workers that a sweep lacks, and finds those that it has."""

    def __init__(self, sweep: Sweep, cluster: ClusterProfile, code: Path, queue: Queue, allocation: Allocation | None = None) -> None:
        """With `allocation`, workers share the nodes of one job; else each is an array task."""
        self.sweep, self.cluster, self.code, self.queue, self.allocation = sweep, cluster, code, queue, allocation
        self.prefix = job_prefix(sweep)
        # The last submission that `missing` saw, and whether all up to it were settled.
        self._seen, self._settled = last_number(sweep), True

    @staticmethod
    def of(sweep: Sweep, queue: Queue) -> "SlurmEngine | None":
        """Return an engine with the last submission's profile, code and allocation, or None."""
        made = Submission.all_of(sweep)[-1:]
        return next((SlurmEngine(sweep, m.cluster, Path(m.code), queue, m.allocation) for m in made), None)

    def live(self) -> list[Element]:
        """Return the array tasks that are queued or run, also those without a recorded job ID."""
        return [e for e in self.queue.named(self.prefix) if not e.ended]

    def _allocations(self) -> dict[str, Allocation]:
        """Return job name -> allocation for all allocations ever requested."""
        return {s.name: s.allocation for s in Submission.all_of(self.sweep) if s.allocation}

    @property
    def allocated(self) -> Allocation | None:
        """Return this sweep's allocation that is queued or runs, or None."""
        shared = self._allocations()
        return next((shared[e.name] for e in self.live() if e.name in shared), None)

    def settle(self, say: Callable[[str], None]) -> None:
        """Resolve submissions without a recorded job ID; wait for one that may be under way."""
        reported = False
        while True:
            undecided = [s for s in self._open_ones() if not self._decide(s, say)]
            if not undecided:
                return
            if not reported:
                say(f"waiting for a submission that {undecided[0].writer.host} has begun")
                reported = True
            time.sleep(2)

    def _open_ones(self) -> list[Submission]:
        return [s for s in Submission.all_of(self.sweep) if not s.job and not s.is_void]

    def _decide(self, submission: Submission, say: Callable[[str], None]) -> bool:
        # Check the submitter first: once it is gone, the queue shows any job it has.
        writer = submission.writer
        if writer.is_local:
            over = not writer.lives() and not _sbatch_lives(submission) and submission.age_seconds > _DEAD_WRITER_SECONDS
        else:
            over = submission.age_seconds > _FAR_WRITER_SECONDS
        found = next((e for e in Queue(0).named(submission.name)), None)
        if found is not None:
            if not submission.job:
                say(f"adopted job {found.array}: its submitter died before recording it")
                submission.write_job(found.array)
            return True
        if over and not submission.job:
            submission.write_void()
        return over

    def serving(self, view: View, started_only: bool = False) -> int:
        """Return how many workers run, or will run, an unfinished trial of this sweep.

        All workers of an allocation count.
        """
        current, shared = self.trial_of_job(view), self._allocations()
        count, withdrawn = 0, None
        for element in self.live():
            state = current.get(element.id)
            started = element.state != "PENDING" or element.restarts > 0
            if started_only and not started:
                continue
            if element.name in shared:
                count += shared[element.name].workers
                continue
            # A withdrawn trial keeps its array task until it ends.
            if state is None and started:
                withdrawn = self._withdrawn_jobs() if withdrawn is None else withdrawn
                if element.id in withdrawn:
                    continue
            # A search's worker goes on to another trial.
            count += state is None or not state.settled or self.sweep.search is not None
        return count

    def trial_of_job(self, view: View) -> dict[str, TrialState]:
        """Return job -> state of the trial that it claimed last."""
        ends = [(past[-1], view.state(t)) for t in self.sweep.trials if (past := view.claims(t))]
        return {last.slurm.job: state for last, state in sorted(ends, key=lambda end: end[0].time) if last.slurm is not None}

    def _withdrawn_jobs(self) -> set[str]:
        ours = {t.signature for t in self.sweep.trials}
        jobs = set()
        for folder in (self.sweep.path / "trials").glob("*"):
            if folder.name not in ours:
                with contextlib.suppress(ValueError):  # a claim that cannot be read
                    jobs |= {c.slurm.job for c in claims.history(folder)[-1:] if c.slurm}
        return jobs

    def missing(self, view: View) -> int:
        """Return how many array tasks to submit so that every trial to run has a worker.

        A negative number says how many are too many. In a search a worker takes one trial after
        another, so more workers than may run at once are useless.
        """
        self._seen = last_number(self.sweep)
        self._settled = not self._open_ones()
        return self.lacking(view, sum(not s.settled for s in view.states().values()) + trials_to_begin(view))

    def lacking(self, view: View, runs: int) -> int:
        """Return how many array tasks to submit for `runs` runs, beside those that exist.

        One allocation serves any number of runs and is requested once, even if array tasks wait.
        """
        if self.allocation is None:
            return self.wanted(runs) - self.serving(view)
        return 0 if self.allocated or runs <= self.serving(view, started_only=True) else 1

    def wanted(self, runs: int) -> int:
        """Return the number of array tasks for `runs` runs if nothing were queued."""
        if self.allocation is not None:
            return min(runs, 1)
        return min(runs, self.cluster.max_parallel or runs) if self.sweep.search is not None else runs

    def cancelled_unclaimed(self, view: View) -> set[str]:
        """Return the IDs of array tasks that were cancelled before they claimed a trial.

        A cancelled allocation always counts: it never has all trials that it would have claimed.
        """
        current, shared = self.trial_of_job(view), self._allocations()
        cancelled = [e for e in self.queue.named(self.prefix) if e.state == "CANCELLED"]
        return {e.id for e in cancelled if e.id not in current or e.name in shared}

    def withdraw(self, workers: int) -> int:
        """Cancel up to `workers` array tasks that have not started; return how many."""
        # Ask again: a task that has started meanwhile has a trial. `scancel --state=PENDING 7_1`
        # would end all pending tasks of array 7.
        waiting = [e for e in Queue(0).named(self.prefix) if e.state == "PENDING" and not e.restarts] if workers > 0 else []
        shared = self._allocations()
        idle = [e.id for e in waiting if e.name not in shared][-workers:]
        slurm.cancel(idle)
        return len(idle)

    def submit(self, workers: int) -> list[Submission]:
        """Submit `workers` workers, or the allocation.

        Together with those already queued, at most the profile's max_parallel run at once. Call
        `missing` just before, with a queue not yet asked. Raise RacedError if another command has
        submitted since, or was about to, and SlurmError with Slurm's message if Slurm refuses.
        """
        if not self._settled:
            raise RacedError("another command is about to submit")
        if self.allocation is not None:
            return [self._submit_array(1, 1, [])]
        throttles = {s.job: s.throttle for s in Submission.all_of(self.sweep)}
        queued = Counter(e.array for e in self.live())
        taken = sum(min(count, throttles.get(array, count)) for array, count in queued.items())
        most = self.cluster.max_parallel or workers + taken
        after_all = sorted(queued) if taken >= most else []
        free = most if after_all else most - taken
        parts = shares(workers, array_limit(), free)
        made: list[Submission] = []
        side_by_side = min(len(parts), free)
        for i, (size, throttle) in enumerate(parts):
            before = [made[i - side_by_side].job] if i >= side_by_side else after_all
            made.append(self._submit_array(size, throttle, before))
        return made

    def planned(self, size: int, throttle: int, after: list[str]) -> Submission:
        """Return the next submission."""
        number = self._seen + 1
        name, cluster, code = f"{self.prefix}{number:04d}", self.cluster, str(self.code)
        return Submission(self.sweep.path, number, name, size, throttle, after, cluster, code, Process.me(), time.time(), self.allocation)

    def _submit_array(self, size: int, throttle: int, after: list[str]) -> Submission:
        wanted = self.planned(size, throttle, after)
        if not wanted.create():
            raise RacedError(f"submission {wanted.number} is another command's")
        self._seen = wanted.number
        refusal = ""
        for _attempt in range(_SUBMIT_ATTEMPTS):
            try:
                wanted.write_job(submit(off_bad_nodes(wanted.job_profile, self.sweep), wanted.array()))
                return wanted
            except SlurmError as error:
                refusal = str(error)
            # The job may exist all the same if only sbatch's answer was lost.
            try:
                if lost := next(iter(Queue(0).named(wanted.name)), None):
                    wanted.write_job(lost.array)
                    return wanted
            except SlurmError as error:
                refusal = str(error)
            if not slurm.may_pass(refusal):
                break
            time.sleep(_ATTEMPT_SECONDS)
        wanted.write_void()
        raise SlurmError(refusal)
