"""Slots in Slurm's queue, nobody to watch them: one throttled job array, one element a slot; or one allocation of nodes, in which Ray
places many. The queue and the folder say what is missing.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from jobs.cluster import Allocation, ClusterProfile
from jobs.slurm import queue as slurm
from jobs.slurm.queue import Element, Queue, SlurmError
from jobs.slurm.sbatch import submit
from sweeps.search.search import to_come
from sweeps.state import claims
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep, TrialState, View
from sweeps.state.submission import Submission, job_prefix, last_number

# sbatch may still be under way when the command that called it is dead, or its job not be listed yet. What another host's command is
# about is not seen from here; it tries for as long as that at most.
_DEAD_WRITER_SECONDS, _FAR_WRITER_SECONDS = 10.0, 600.0
_MAX_ARRAY_SIZE = 1001  # Slurm's default
_SUBMIT_ATTEMPTS, _ATTEMPT_SECONDS = 8, 5.0


def _sbatch_lives(submission: Submission) -> bool:
    """Whether a process of this machine submits from the sweep's log folder, where submitit puts its scripts."""
    lines = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    return any("sbatch" in line and any(w.startswith(str(submission.log_folder)) for w in line) for line in lines)


def shares(slots: int, limit: int, free: int) -> list[tuple[int, int]]:
    """(slots, elements at once) of each array: at most `limit` elements in one, together `free` at once.

    Where there are more arrays than `free`, those past the first `free` wait for one before them, and may take its share.
    """
    count = -(-slots // limit)
    sizes = [slots // count + (i < slots % count) for i in range(count)]
    side_by_side = min(count, free)
    room = [free // side_by_side + (i < free % side_by_side) for i in range(side_by_side)]
    return [(size, min(size, room[i % side_by_side])) for i, size in enumerate(sizes)]


def array_limit() -> int:
    """Elements that one array of this site may have; Slurm's default where it does not say."""
    with contextlib.suppress(SlurmError, ValueError):
        return int(slurm.controller_setting("MaxArraySize"))
    return _MAX_ARRAY_SIZE


class RacedError(RuntimeError):
    """Another command has submitted since `missing` was asked; nothing was submitted."""


class SlurmEngine:
    """Submits the slots that a sweep misses, and finds those that it has."""

    def __init__(self, sweep: Sweep, cluster: ClusterProfile, code: Path, queue: Queue, allocation: Allocation | None = None) -> None:
        """With `allocation` its slots share nodes of one job, else each is an element of an array."""
        self.sweep, self.cluster, self.code, self.queue, self.allocation = sweep, cluster, code, queue, allocation
        self.prefix = job_prefix(sweep)
        # The last submission that `missing` took into account, and whether all until then were settled.
        self._seen, self._settled = last_number(sweep), True

    @staticmethod
    def of(sweep: Sweep, queue: Queue) -> "SlurmEngine | None":
        """The engine of the sweep's last submission: its profile, its code and its allocation; None where there was none."""
        made = Submission.all_of(sweep)[-1:]
        return next((SlurmEngine(sweep, m.cluster, Path(m.code), queue, m.allocation) for m in made), None)

    def live(self) -> list[Element]:
        """The elements that are queued or run, also those of submissions whose number was never written down."""
        return [e for e in self.queue.named(self.prefix) if not e.ended]

    def _allocations(self) -> dict[str, Allocation]:
        """Those that were ever asked for, by the names of their jobs."""
        return {s.name: s.allocation for s in Submission.all_of(self.sweep) if s.allocation}

    @property
    def allocated(self) -> Allocation | None:
        """The allocation of this sweep that is queued or runs."""
        shared = self._allocations()
        return next((shared[e.name] for e in self.live() if e.name in shared), None)

    def settle(self, say: Callable[[str], None]) -> None:
        """Find out what became of submissions that were begun and not written down; waits for one that may still be under way."""
        told = False
        while True:
            undecided = [s for s in self._open_ones() if not self._decide(s, say)]
            if not undecided:
                return
            if not told:
                say(f"waiting for a submission that {undecided[0].writer.host} has begun")
                told = True
            time.sleep(2)

    def _open_ones(self) -> list[Submission]:
        return [s for s in Submission.all_of(self.sweep) if not s.job and not s.is_void]

    def _decide(self, submission: Submission, say: Callable[[str], None]) -> bool:
        # Whether anybody may still submit comes first: who is gone before the queue is asked has no job that the queue does not show.
        writer = submission.writer
        if writer.is_local:
            over = not writer.lives() and not _sbatch_lives(submission) and submission.age_seconds > _DEAD_WRITER_SECONDS
        else:
            over = submission.age_seconds > _FAR_WRITER_SECONDS
        found = next((e for e in Queue(0).named(submission.name)), None)
        if found is not None:
            if not submission.job:
                say(f"adopted job {found.array}: its submitter did not live to write it down")
                submission.write_job(found.array)
            return True
        if over and not submission.job:
            submission.write_void()
        return over

    def serving(self, view: View, started_only: bool = False) -> int:
        """How many slots will run, or are running, a trial of this sweep that has not ended; an allocation keeps all of its own."""
        current, shared = self.trial_of_job(view), self._allocations()
        count, withdrawn = 0, None
        for element in self.live():
            state = current.get(element.id)
            started = element.state != "PENDING" or element.restarts > 0
            if started_only and not started:
                continue
            if element.name in shared:
                count += shared[element.name].slots
                continue
            # A trial that the sweep has withdrawn keeps its element until it ends.
            if state is None and started:
                withdrawn = self._withdrawn_jobs() if withdrawn is None else withdrawn
                if element.id in withdrawn:
                    continue
            count += state is None or not state.settled or self.sweep.search is not None  # a search's goes on to another trial
        return count

    def trial_of_job(self, view: View) -> dict[str, TrialState]:
        """The state of the trial that each job has claimed last."""
        latest: dict[str, tuple[float, TrialState]] = {}
        for trial in self.sweep.trials:
            last = next(iter(view.claims(trial)[-1:]), None)
            if last is not None and last.slurm is not None:
                known = latest.get(last.slurm.job)
                if known is None or known[0] < last.time:
                    latest[last.slurm.job] = last.time, view.state(trial)
        return {job: state for job, (_, state) in latest.items()}

    def _withdrawn_jobs(self) -> set[str]:
        ours = {t.signature for t in self.sweep.trials}
        jobs = set()
        for folder in (self.sweep.path / "trials").glob("*"):
            if folder.name not in ours and (past := claims.history(folder)) and past[-1].slurm:
                jobs.add(past[-1].slurm.job)
        return jobs

    def missing(self, view: View) -> int:
        """Elements to submit so that every trial that is to run has a slot; negative where so many are too many.

        A slot of a search takes one trial after the other, and more than run at once are of no use to it.
        """
        self._seen = last_number(self.sweep)
        self._settled = not self._open_ones()
        return self.lacking(view, sum(not s.settled for s in view.states().values()) + to_come(view))

    def lacking(self, view: View, runs: int) -> int:
        """Elements to submit for so many runs beside those that there are.

        One allocation serves any number of them, and is not asked for twice; elements of an array that only wait do not keep it away, since
        who asks for an allocation wants the trials to run there.
        """
        if self.allocation is None:
            return self.wanted(runs) - self.serving(view)
        return 0 if self.allocated or runs <= self.serving(view, started_only=True) else 1

    def wanted(self, runs: int) -> int:
        """Elements for so many runs, were nothing queued."""
        if self.allocation is not None:
            return min(runs, 1)
        return min(runs, self.cluster.max_parallel or runs) if self.sweep.search is not None else runs

    def cancelled_unclaimed(self, view: View) -> set[str]:
        """Elements that were cancelled before they had claimed a trial; an allocation never has all that it would have claimed."""
        current, shared = self.trial_of_job(view), self._allocations()
        cancelled = [e for e in self.queue.named(self.prefix) if e.state == "CANCELLED"]
        return {e.id for e in cancelled if e.id not in current or e.name in shared}

    def withdraw(self, slots: int) -> int:
        """Cancel up to `slots` elements of arrays that have not started; returns how many there were."""
        # Asked anew: one that has started meanwhile has a trial. (`scancel --state=PENDING 7_1` would end all of array 7 that waits.)
        waiting = [e for e in Queue(0).named(self.prefix) if e.state == "PENDING" and not e.restarts] if slots > 0 else []
        shared = self._allocations()
        idle = [e.id for e in waiting if e.name not in shared][-slots:]
        slurm.cancel(idle)
        return len(idle)

    def submit(self, slots: int) -> list[Submission]:
        """Submit `slots` slots, never more than the profile's max_parallel at once with those that are queued already; or the allocation.

        `missing` must have been asked just before, of a queue that had not been asked. Raises RacedError where another command has
        submitted since, or was about to, SlurmError with Slurm's words where it refuses.
        """
        if not self._settled:
            raise RacedError("another command is about to submit")
        if self.allocation is not None:
            return [self._submit_array(1, 1, [])]
        throttles = {s.job: s.throttle for s in Submission.all_of(self.sweep)}
        queued = Counter(e.array for e in self.live())
        taken = sum(min(count, throttles.get(array, count)) for array, count in queued.items())
        most = self.cluster.max_parallel or slots + taken
        after_all = sorted(queued) if taken >= most else []
        free = most if after_all else most - taken
        parts = shares(slots, array_limit(), free)
        made: list[Submission] = []
        side_by_side = min(len(parts), free)
        for i, (size, throttle) in enumerate(parts):
            before = [made[i - side_by_side].job] if i >= side_by_side else after_all
            made.append(self._submit_array(size, throttle, before))
        return made

    def planned(self, slots: int, throttle: int, after: list[str]) -> Submission:
        """The submission that comes next."""
        number = self._seen + 1
        name, cluster, code = f"{self.prefix}{number:04d}", self.cluster, str(self.code)
        return Submission(self.sweep.path, number, name, slots, throttle, after, cluster, code, Process.me(), time.time(), self.allocation)

    def _submit_array(self, slots: int, throttle: int, after: list[str]) -> Submission:
        wanted = self.planned(slots, throttle, after)
        if not wanted.create():
            raise RacedError(f"submission {wanted.number} is another command's")
        self._seen = wanted.number
        refusal = ""
        for _attempt in range(_SUBMIT_ATTEMPTS):
            try:
                wanted.write_job(submit(wanted.job_profile, wanted.array()))
                return wanted
            except SlurmError as error:
                refusal = str(error)
            # The job may be there all the same: its answer was lost.
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
