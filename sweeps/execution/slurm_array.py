"""Place workers in Slurm's queue: as tasks of throttled arrays, or by Ray in one allocation."""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

from jobs.cluster import Allocation, ClusterProfile
from jobs.slurm import queue as slurm
from jobs.slurm.limits import array_limit, room_for, shares, submit_limit
from jobs.slurm.nodes import off_bad_nodes
from jobs.slurm.queue import Element, Queue, SlurmError
from sweeps.execution.submitting import QueueFullError, submit_once
from sweeps.search.search import trials_to_begin
from sweeps.state import claims
from sweeps.state.claims import Process
from sweeps.state.folder import Sweep
from sweeps.state.place import Place
from sweeps.state.submission import Submission, job_prefix, last_number
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

# After the death of the command that called sbatch, sbatch may still run, or its job not be listed
# yet. A command on another host cannot be observed; it tries for at most the longer time.
_DEAD_WRITER_SECONDS, _FAR_WRITER_SECONDS = 10.0, 600.0
_LIMIT_SECONDS = 600.0  # between two questions for the limit of queued jobs


def _sbatch_lives(submission: Submission) -> bool:
    """Return whether an sbatch on this machine, or a site's wrapper of it, runs a script in the log folder."""
    lines = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    return any("sbatch" in map(os.path.basename, line) and any(w.startswith(str(submission.log_folder)) for w in line) for line in lines)


class RacedError(RuntimeError):
    """Another command has submitted since `missing` was called. Nothing was submitted."""


class SlurmEngine:
    """Submits the workers that a sweep lacks, and finds those that it has."""

    def __init__(self, sweep: Sweep, cluster: ClusterProfile, code: Path, queue: Queue, allocation: Allocation | None = None) -> None:
        """With `allocation`, workers share the nodes of one job; else each is an array task."""
        self.sweep, self.cluster, self.code, self.queue, self.allocation = sweep, cluster, code, queue, allocation
        self.prefix = job_prefix(sweep)
        self.refused = ""  # Slurm's words if the last `submit` could not submit all workers
        self.leaving = ""  # a job that is about to end, whose worker does not count
        self._limit: tuple[float, int | None] = float("-inf"), None  # when Slurm was asked, and what it said
        # The last submission that `missing` saw, and whether all up to it were settled.
        self._seen, self._settled = last_number(sweep), True

    @staticmethod
    def of(sweep: Sweep, queue: Queue) -> "SlurmEngine | None":
        """Return an engine with the last submission's profile, code and allocation, or None."""
        made = Submission.all_of(sweep)[-1:]
        return next((SlurmEngine(sweep, m.cluster, Path(m.code), queue, m.allocation) for m in made), None)

    def live(self) -> list[Element]:
        """Return the array tasks that are queued or run, also those without a recorded job ID."""
        return [e for e in self.queue.named(self.prefix) if not e.ended and e.id != self.leaving]

    def _allocations(self) -> dict[str, Allocation]:
        """Return job name -> allocation for all allocations ever requested."""
        return {s.name: s.allocation for s in Submission.all_of(self.sweep) if s.allocation}

    @property
    def allocated(self) -> Allocation | None:
        """Return this sweep's allocation that is queued or runs, or None."""
        shared = self._allocations()
        return next((shared[e.name] for e in self.live() if e.name in shared), None)

    def settle(self, say: Callable[[str], None]) -> None:
        """Wait until nothing is `unsettled`, and say what is waited for."""
        reported = False
        while why := self.unsettled(say):
            if not reported:
                say(why)
                reported = True
            time.sleep(2)

    def unsettled(self, say: Callable[[str], None]) -> str:
        """Return why it is not known yet which workers are queued, or "" if it is.

        Submissions without a recorded job ID are resolved, and jobs that Slurm does not list are
        looked for again.
        """
        self.queue.look_again()
        if undecided := [s for s in self._open_ones() if not self._decide(s, say)]:
            return f"waiting for a submission that {undecided[0].writer.host} has begun"
        if missing := [s.job for s in self.in_doubt()]:
            return f"waiting for a second look: Slurm does not list job {', '.join(missing[:5])}"
        return ""

    def in_doubt(self) -> list[Submission]:
        """Return the submissions whose jobs may be queued although Slurm does not list them."""
        made = [s for s in Submission.all_of(self.sweep) if s.job and s.place is Place.here]
        jobs = self.queue.in_doubt({s.job: (s.name, s.age_seconds) for s in made})
        return [s for s in made if s.job in jobs]

    def is_settled(self) -> bool:
        """Return whether it is known which workers are queued."""
        return not self._open_ones() and not self.in_doubt()

    def _open_ones(self) -> list[Submission]:
        return [s for s in Submission.all_of(self.sweep) if not s.job and not s.is_void and s.place is Place.here]

    def _decide(self, submission: Submission, say: Callable[[str], None]) -> bool:
        # Check the submitter first: once it is gone, the queue shows any job it has.
        writer = submission.writer
        if writer.is_local:
            over = not writer.lives() and not _sbatch_lives(submission) and submission.age_seconds > _DEAD_WRITER_SECONDS
        else:
            over = submission.age_seconds > _FAR_WRITER_SECONDS
        found = submission.listed(self.queue)
        if found is not None:
            if not submission.job:
                say(f"adopted job {found.array}: its submitter died before recording it")
                submission.write_job(found.array)
            return True
        over = self.queue.is_gone(submission.name) and over
        if over and not submission.job:
            submission.write_void()
        return over

    def serving(self, view: View, started_only: bool = False) -> int:
        """Return how many workers run, or will run, an unfinished trial of this sweep.

        All workers of an allocation count. So do those that run although Slurm does not list their
        job: their heartbeat is fresh.
        """
        current, shared, live = self.trial_of_job(view), self._allocations(), self.live()
        withdrawn, listed = None, {e.id for e in live} | {self.leaving}
        running = [t for t in self.sweep.trials if view.state(t) is TrialState.running]
        owners = [self._claims_here(view.claims(t)[-1:]) for t in running]
        count = sum(not own or own[0].slurm is None or own[0].slurm.job not in listed for own in owners)
        for element in live:
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
        ends = [(past[-1], view.state(t)) for t in self.sweep.trials if (past := self._claims_here(view.claims(t)))]
        return {last.slurm.job: state for last, state in sorted(ends, key=lambda end: end[0].time) if last.slurm is not None}

    def _claims_here(self, past: list[claims.Claim]) -> list[claims.Claim]:
        """Return the claims that no job of another cluster made: its numbers mean other jobs here."""
        return [c for c in past if c.slurm is None or not self.queue.is_elsewhere(c.slurm.cluster)]

    def _withdrawn_jobs(self) -> set[str]:
        ours = {t.signature for t in self.sweep.trials}
        jobs = set()
        for folder in (self.sweep.path / "trials").glob("*"):
            if folder.name not in ours:
                with contextlib.suppress(ValueError):  # a claim that cannot be read
                    jobs |= {c.slurm.job for c in self._claims_here(claims.history(folder)[-1:]) if c.slurm}
        return jobs

    def missing(self, view: View) -> int:
        """Return how many array tasks to submit so that every trial to run has a worker.

        A negative number says how many are too many. In a search a worker takes one trial after
        another, so more workers than may run at once are useless.
        """
        self._seen = last_number(self.sweep)
        self._settled = self.is_settled()
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

    def given_up(self, view: View) -> int:
        """Return how many workers, submitted since the last command, a person ended before they began.

        A worker that Slurm no longer lists, and that has no log, counts as well: whether it was
        cancelled cannot be known. Only a command submits others for these.
        """
        since = (self.sweep.path / "sweep.json").stat().st_mtime
        begun = {c.slurm.job for t in self.sweep.trials for c in view.claims(t) if c.slurm}
        listed, count = self.queue.elements(), 0
        for made in Submission.all_of(self.sweep):
            if made.job and made.place is Place.here and made.allocation is None and made.path.stat().st_mtime >= since:
                ids = [f"{made.job}_{i}" for i in range(made.size)] if made.throttle else [made.job]
                for job in ids:
                    if job not in begun and not self._withdrawal(made.number, job).exists():
                        found = listed.get(job)
                        count += found.state == "CANCELLED" if found else not (made.log_folder / f"{job}.log").exists()
        return count

    def _withdrawal(self, number: int, job: str) -> Path:
        """Return the file that says that a waiting task was cancelled because it was one too many."""
        return Submission.file(self.sweep.path, number, f"{job}.withdrawn")

    def withdraw(self, workers: int) -> int:
        """Cancel up to `workers` array tasks that have not started; return how many."""
        # Ask again: a task that has started meanwhile has a trial. `scancel --state=PENDING 7_1`
        # would end all pending tasks of array 7.
        self.queue.look_again()
        waiting = [e for e in self.queue.named(self.prefix) if e.state == "PENDING" and not e.restarts] if workers > 0 else []
        shared = self._allocations()
        idle = [e.id for e in waiting if e.name not in shared][-workers:]
        slurm.cancel(idle)
        numbers = {made.job: made.number for made in Submission.all_of(self.sweep) if made.job}
        for job in idle:
            if number := numbers.get(job.partition("_")[0]):
                self._withdrawal(number, job).touch()
        return len(idle)

    def room(self) -> tuple[int, int] | None:
        """Return how many more jobs the user may queue, and the limit, or None without one."""
        if time.monotonic() - self._limit[0] > _LIMIT_SECONDS:
            self._limit = time.monotonic(), submit_limit(self.cluster)
        if (limit := self._limit[1]) is None:
            return None
        return room_for(limit, self.queue), limit

    def fitting(self, workers: int, all_of_it: bool = False) -> int:
        """Return how many of `workers` may be queued now.

        If not all may, one job is left over, unless `all_of_it` may be taken: where Slurm does not
        requeue, a job that ends before its trial needs it for its successor.
        """
        if self.allocation is not None or (found := self.room()) is None:
            return workers
        room, limit = found
        fits = workers if room >= workers else room if all_of_it else min(room, max(room - 1, 1))
        self.refused = "" if fits == workers else f"{limit - room} of at most {limit} jobs of this user are queued"
        return fits

    def submit(self, workers: int, all_of_it: bool = False) -> list[Submission]:
        """Submit `workers` workers, or as many as may be queued, or the allocation.

        Together with those already queued, at most the profile's max_parallel run at once. Call
        `missing` just before, with a queue not yet asked. Raise RacedError if another command has
        submitted since, or was about to. Raise SlurmError with Slurm's words if nothing could be
        submitted, QueueFullError if only for now. If a part could, return it; `refused` has the words.
        """
        if not self._settled:
            raise RacedError("another command is about to submit")
        self.refused = ""
        made: list[Submission] = []
        fits = size = self.fitting(workers, all_of_it)
        while size and (left := fits - sum(m.size for m in made)) > 0:
            try:
                self._submit_arrays(min(size, left), made)
            except QueueFullError as error:
                self.refused, size = str(error), error.size // 2  # a limit that Slurm does not show is met by halving
            except (SlurmError, RacedError) as error:
                if not made:
                    raise
                self.refused = str(error) if isinstance(error, SlurmError) else ""
                break
        if not made:
            raise QueueFullError(self.refused)
        return made

    def _submit_arrays(self, workers: int, made: list[Submission]) -> None:
        """Submit all of `workers` workers, and append each submission to `made`."""
        limit = array_limit()
        if self.allocation is not None:
            made.append(self._submit_array(1, int(limit > 1), []))
            return
        throttles = {s.job: s.throttle for s in Submission.all_of(self.sweep)}
        queued = Counter({m.job: m.size for m in made}) | Counter(e.array for e in self.live())
        taken = sum(min(count, throttles.get(array, 0) or count) for array, count in queued.items())
        most = self.cluster.max_parallel or workers + taken
        after_all = sorted(queued) if taken >= most else []
        free = most if after_all else most - taken
        parts = shares(workers, limit, free)
        side_by_side, first = min(len(parts), free), len(made)
        for i, (size, throttle) in enumerate(parts):
            before = [made[first + i - side_by_side].job] if i >= side_by_side else after_all
            made.append(self._submit_array(size, throttle, before))

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
        submit_once(wanted, off_bad_nodes(wanted.job_profile, self.sweep.nodes), self.queue)
        return wanted
