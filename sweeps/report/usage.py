"""Compare what ended trials used with what they requested, and advise on the next request.

The numbers come from sacct and the trainer's own counters. Advice rests only on measurements.
"""

import math
import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cnnjepa.run.folder import RunStatus
from jobs.cluster import ClusterProfile
from jobs.cost import same_shape
from jobs.slurm import sacct
from jobs.slurm.queue import SlurmError, SlurmSilentError, has_slurm
from jobs.slurm.sacct import JobUse
from jobs.task import task_of
from sweeps.report.machine import Machine, machine_of
from sweeps.spec.sweep import Trial
from sweeps.state import claims
from sweeps.state.submission import Submission
from sweeps.state.view import View

_TIME_MARGIN, _TIME_ROUND_MINUTES = 1.25, 15
_MEMORY_MARGIN = 1.2
_CORES_MARGIN, _IDLE_CORES = 1.25, 0.5
_WAITS, _NEVER_WAITS, _MANY_WORKERS = 0.05, 0.005, 4
_WORTH_IT = 0.9  # a request that shrinks by less is left alone
# Slurm's controller passes an ended job to the accounting within seconds, or tens under load.
_RECORD_WITHIN_SECONDS, _JUST_ENDED_SECONDS = 20.0, 600.0
_MB_A_GB = 1000  # as jobs/slurm/sbatch.py counts a profile's memory_gb_per_trial


@dataclass(frozen=True)
class Efficiency:
    """Resources that an ended trial used, with shares of its request. None means not reported."""

    source: str  # sacct or counters
    seconds: float  # for which it held its worker, over all starts
    limit_seconds: float | None
    time_share: float | None  # of one start's limit: above 1 the run took several starts
    cores: int
    cpu_share: float | None
    # Of all ranks: the peak from sacct, else the main rank's peak times the number of ranks.
    memory_mb: float | None
    memory_asked_mb: float | None
    memory_share: float | None
    on_gpu: bool | None  # None if unknown here
    # Of the main rank, from its result: of its tensors on a GPU, else of its process.
    peak_mb: float | None
    gpu_utilisation: float | None
    data_wait_share: float | None
    images_per_second: float | None
    images_per_second_without_wait: float | None
    best_images_per_second: float | None  # of the sweep's completed runs of the same shape


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def own_jobs(view: View, trial: Trial) -> list[str]:
    """Return the Slurm jobs of this trial, [] if any part ran outside this Slurm or shared a job."""
    past, queue = [c.slurm for c in view.claims(trial)], view.watch.queue
    own = all(s is not None and not s.shared and not (queue and queue.is_elsewhere(s.cluster)) for s in past)
    return list(dict.fromkeys(s.job for s in past if s)) if own else []


def account(view: View, trials: Iterable[Trial]) -> None:
    """Ask sacct about new jobs of `trials`. If it does not answer, the counters stand alone."""
    new = [job for trial in trials for job in own_jobs(view, trial) if job not in view.accounted]
    if new and has_slurm():
        _take_up(view, new, lambda: sacct.used(new))


def _take_up(view: View, jobs: Sequence[str], ask: Callable[[], dict[str, JobUse]]) -> None:
    """Keep sacct's answers about `jobs` in the view, and whether it answers at all."""
    found: dict[str, JobUse] = {}
    try:
        found, view.accounting = ask(), "answers"
    except SlurmSilentError:
        view.accounting = "silent"
    except SlurmError:
        view.accounting = "none"
    view.accounted |= {job: found.get(job) for job in jobs}


def just_ended(view: View, trial: Trial) -> bool:
    """Return whether the record of the trial's job may not have arrived yet."""
    return time.time() - view.sweep.run(trial).ended_at() < _JUST_ENDED_SECONDS


def await_records(view: View) -> None:
    """Wait, but not for long, until sacct has the end of jobs that have just ended."""
    ended = [t for t in view.sweep.trials if view.result(t) is not None and just_ended(view, t)]
    jobs = list(dict.fromkeys(job for t in ended for job in own_jobs(view, t)))
    if jobs and has_slurm():
        _take_up(view, jobs, lambda: sacct.used_at_the_end(jobs, _RECORD_WITHIN_SECONDS))


def missing_line(view: View) -> str:
    """Return how many jobs the accounting lacks, and the command to try later, or ""."""
    known = {job: just_ended(view, t) for t in view.sweep.trials if view.result(t) is not None for job in own_jobs(view, t)}
    again = f"python -m sweeps advice {shlex.quote(str(view.sweep.path))}"
    if known and view.accounting == "silent":
        return f"sacct does not answer, so these are the trainer's own counters; later: {again}"
    if view.accounting != "answers":
        return ""
    instead = "the trainer's own counters are used instead"
    uses = {job: view.accounted.get(job) for job in known}
    coming = [job for job, use in uses.items() if (known[job] if use is None else not use.ended)]
    lost = [job for job, use in uses.items() if use is None and not known[job]]
    if coming:
        return f"not yet in the accounting: the end of {len(coming)} of {len(known)} jobs; {instead}; later: {again}"
    return f"sacct has no record of {len(lost)} of {len(known)} jobs; {instead}" if lost else ""


class Sight:
    """Lookups shared by all trials of a sweep: profiles, and the best rate of each kind of run."""

    def __init__(self, view: View) -> None:
        self.view = view
        known, self.damaged = Submission.readable_of(view.sweep)
        self._profiles = {s.job: s.worker_profile for s in known}
        # (configuration, best images/s of the runs like it)
        self._kinds: list[tuple[dict[str, Any], float]] = []
        for trial in view.sweep.trials:
            result = view.result(trial)
            if result is not None and result.status is RunStatus.completed:
                at, best = self._kind(trial)
                self._kinds[at:] = [(trial.values, max(best, result.images_per_second)), *self._kinds[at + 1 :]]

    def _kind(self, trial: Trial) -> tuple[int, float]:
        """Return the (future) index of a trial's kind, and its best rate so far."""
        for at, (values, best) in enumerate(self._kinds):
            if same_shape(values, trial.values) and _threads(values) == _threads(trial.values):
                return at, best
        return len(self._kinds), 0.0

    def best_rate(self, trial: Trial) -> float | None:
        """Return images/s of the fastest completed run of the same shape and threads, or None."""
        return self._kind(trial)[1] or None

    def profile(self, trial: Trial) -> ClusterProfile | None:
        """Return the resources of the trial's last worker, or None outside Slurm."""
        last = next((c.slurm for c in reversed(self.view.claims(trial)) if c.slurm), None)
        return self._profiles.get(last.job.partition("_")[0]) if last else None


def _threads(values: Mapping[str, Any]) -> int:
    return int(task_of(values).value(values, "threads", 1))


def _on_gpu(trial: Trial, profile: ClusterProfile | None) -> bool | None:
    """Return whether the trial trained on a GPU, or None if unknown here."""
    device = task_of(trial.values).value(trial.values, "device", "cpu")
    if device == "auto":
        return None if profile is None or profile.device.name == "auto" else profile.device.name == "cuda"
    return bool(device == "cuda")


def efficiency(view: View, trial: Trial, sight: Sight | None = None) -> Efficiency | None:
    """Return what an ended trial used of its request, or None if it has not ended."""
    result = view.result(trial)
    if result is None:
        return None
    account(view, [trial])
    jobs = [view.accounted.get(job) for job in own_jobs(view, trial)]
    # sacct knows too little of a running job
    uses = [use for use in jobs if use is not None and use.ended]
    sight = sight or Sight(view)
    profile, folder = sight.profile(trial), view.sweep.trial_dir(trial)
    rate, waited = result.images_per_second or None, result.data_wait_share
    on_gpu = _on_gpu(trial, profile)
    held = sum(claims.held_seconds(folder, c) for c in view.claims(trial))
    ranks = profile.ranks_per_trial if profile else 1
    cores, limit, cpu, source = ranks * _threads(trial.values), None, None, "counters"
    peak = result.peak_memory_mb or None
    seconds = held or result.seconds
    # A loader's processes are not in the peak of the rank.
    memory = peak * ranks if peak and on_gpu is False and not task_of(trial.values).value(trial.values, "workers", 0) else None
    asked = profile.memory_gb_per_trial * _MB_A_GB if profile else None
    if profile:
        cores, limit = profile.cores_per_trial, 60.0 * profile.time_limit_minutes
    if uses and len(uses) == len(jobs):
        source, seconds, cores = "sacct", sum(u.seconds for u in uses), uses[-1].cores
        limit, asked = uses[-1].limit_seconds, uses[-1].memory_asked_mb
        memory = max((u.memory_used_mb for u in uses if u.memory_used_mb is not None), default=None)
        given = sum(u.seconds * u.cores for u in uses)
        cpu = _share(sum(u.cpu_seconds or 0.0 for u in uses), given) if all(u.cpu_seconds is not None for u in uses) else None
    return Efficiency(
        source=source,
        seconds=seconds,
        limit_seconds=limit,
        time_share=_share(seconds, limit),
        cores=cores,
        cpu_share=cpu,
        memory_mb=memory,
        memory_asked_mb=asked,
        memory_share=_share(memory, asked),
        on_gpu=on_gpu,
        peak_mb=peak,
        gpu_utilisation=result.gpu_utilisation,
        data_wait_share=waited,
        images_per_second=rate,
        images_per_second_without_wait=rate / (1 - waited) if rate and waited is not None and waited < 1 else None,
        best_images_per_second=sight.best_rate(trial),
    )


def all_of(view: View) -> dict[str, Efficiency]:
    """Return run ID -> efficiency of every ended trial, with one call of sacct."""
    ended, sight = [t for t in view.sweep.trials if view.result(t) is not None], Sight(view)
    account(view, ended)
    return {t.signature: found for t in ended if (found := efficiency(view, t, sight)) is not None}


def clock(seconds: float) -> str:
    """Return '12:05:00', or '45 s' below two minutes."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds // 3600:.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60:02.0f}"


def _given(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None]


def used_line(found: Sequence[Efficiency]) -> str:
    """Return what the longest and the largest of the runs used of the request."""
    longest, parts = max(found, key=lambda e: e.seconds), []
    if longest.time_share is not None and longest.limit_seconds is not None:
        parts.append(f"time {100 * longest.time_share:.0f} % of {clock(longest.limit_seconds)}")
    else:
        parts.append(f"time {clock(longest.seconds)}")
    largest = max((e for e in found if e.memory_mb is not None), key=lambda e: e.memory_mb or 0.0, default=None)
    if largest is not None and largest.memory_mb is not None:
        of = f" ({100 * largest.memory_share:.0f} % of {(largest.memory_asked_mb or 0) / _MB_A_GB:.3g})" if largest.memory_share else ""
        parts.append(f"memory {largest.memory_mb / _MB_A_GB:.2g} GB{of}")
    elif peaks := _given(e.peak_mb for e in found if not e.on_gpu):
        parts.append(f"peak memory of a process {max(peaks):.0f} MiB")
    if cpu := _given(e.cpu_share for e in found):
        parts.append(f"cores {100 * statistics.median(cpu):.0f} % of {found[0].cores}")
    else:
        parts.append(f"cores {found[0].cores}")
    if on_gpu := _given(e.peak_mb for e in found if e.on_gpu):
        busy = _given(e.gpu_utilisation for e in found)
        share = f"busy {100 * statistics.median(busy):.0f} % of the time" if busy else "utilization not reported"
        parts.append(f"GPU {share}, its tensors {max(on_gpu) / 1024:.1f} GiB")
    sources = " and ".join(sorted({e.source for e in found}))
    return f"used at most, by {len(found)} completed runs ({sources}): {', '.join(parts)}"


def speed_line(found: Sequence[Efficiency]) -> str:
    """Return a line about images/s and waits for data, or "" if no images were loaded."""
    timed = [e for e in found if e.images_per_second and e.best_images_per_second]
    if not timed:
        return ""
    slowest = min((e.images_per_second or 0.0) / (e.best_images_per_second or 1.0) for e in timed)
    fastest = max(timed, key=lambda e: e.images_per_second or 0.0)
    line = f"speed: up to {fastest.images_per_second:,.0f} images/s"
    if len(timed) > 1:
        line += f"; the slowest run had {100 * slowest:.0f} % of the best of its kind"
    if waits := _given(e.data_wait_share for e in timed):
        gain = (
            f", without it up to {fastest.images_per_second_without_wait:,.0f} images/s" if fastest.images_per_second_without_wait else ""
        )
        line += f"; {100 * statistics.median(waits):.1f} % of the time waiting for data{gain}"
    return line


def requests(
    found: Sequence[Efficiency],
    ranks: int,
    workers: int,
    uses: Sequence[JobUse],
    workers_key: str | None,
    machine: Machine = Machine(),  # noqa: B008, it cannot be changed
) -> list[str]:
    """Return what to request next time as 'key=value (reason)', where it should change; nothing exceeds `machine`.

    `workers` are a run's loader processes, `workers_key` is the task's key for them, or None.
    """
    asked: list[str] = []
    longest = max(found, key=lambda e: e.seconds)
    if longest.limit_seconds is not None:
        step, limit = _TIME_ROUND_MINUTES, longest.limit_seconds / 60
        minutes = step * math.ceil(longest.seconds / 60 * _TIME_MARGIN / step)
        if minutes <= _WORTH_IT * limit:
            asked.append(f"time_limit_minutes={minutes} (instead of {limit:.0f}: shorter jobs start sooner)")
        elif longest.seconds > longest.limit_seconds:
            asked.append(f"time_limit_minutes={minutes} (instead of {limit:.0f}: a run took several jobs)")
    memory, given = _given(e.memory_mb for e in found), _given(e.memory_asked_mb for e in found)
    if memory and given:
        gigabytes = machine.memory_at_most(max(math.ceil(max(memory) * _MEMORY_MARGIN / _MB_A_GB), 1))
        grows = max(memory) > _WORTH_IT * given[0] and gigabytes > given[0] / _MB_A_GB
        if gigabytes <= _WORTH_IT * given[0] / _MB_A_GB or grows:
            asked.append(f"memory_gb_per_trial={gigabytes} (instead of {given[0] / _MB_A_GB:g})")
    killed = sum(u.state == "OUT_OF_MEMORY" for u in uses)
    if killed and given and machine.memory_at_most(math.ceil(given[0] / _MB_A_GB) + 1) > given[0] / _MB_A_GB:
        asked.append(f"memory_gb_per_trial above {given[0] / _MB_A_GB:g} ({killed} jobs ran out of memory)")
    elif killed and given:
        asked.append(f"less memory of a run, since its node has no more than {machine.memory_gb:g} GB ({killed} jobs ran out of it)")
    waits, cores = _given(e.data_wait_share for e in found), found[0].cores
    waited = statistics.median(waits) if waits and workers_key else None
    if waited is not None and waited > _WAITS:
        more = machine.workers_at_most(max(2 * workers, 1), ranks)
        room = f" and cores_per_trial={ranks * (more + 1)}" if more + 1 > cores // ranks else ""
        if more > workers:
            asked.append(f"{workers_key}={more} (instead of {workers}: {100 * waited:.0f} % of the time waiting for data){room}")
    elif waited is not None and waited < _NEVER_WAITS and workers >= _MANY_WORKERS:
        asked.append(f"{workers_key}={workers // 2} (instead of {workers}: no wait for data)")
    cpu = _given(e.cpu_share for e in found)
    if cpu and max(cpu) < _IDLE_CORES and (waited is None or waited <= _WAITS):
        needed = machine.cores_at_most(ranks * max(math.ceil(max(cpu) * cores * _CORES_MARGIN / ranks), 1))
        if needed <= _WORTH_IT * cores:
            asked.append(f"cores_per_trial={needed} (instead of {cores}: {100 * max(cpu):.0f} % of them used)")
    return asked


def advice_lines(view: View) -> list[str]:
    """Return at most four lines of advice, and what cannot be read; [] before any run completed.

    Only completed runs count: those that broke off say little about what a run needs.
    """
    known = all_of(view)
    # A trial that has ended since then has to wait for the next time.
    trials = [
        t for t in view.sweep.trials if t.signature in known and (r := view.result(t)) is not None and r.status is RunStatus.completed
    ]
    if not trials:
        return []
    sight = Sight(view)
    found, profile = [known[t.signature] for t in trials], sight.profile(trials[0])
    lines = [*sight.damaged, used_line(found), missing_line(view), speed_line(found)]
    uses = [use for use in view.accounted.values() if use is not None]
    # Trials with different requests are no measure for one request.
    alike = {(e.cores, e.limit_seconds, e.memory_asked_mb) for e in found}
    task = view.sweep.task
    workers = {int(task.value(t.values, "workers", 0)) for t in trials}
    ranks, key = profile.ranks_per_trial if profile else 1, task.KEYS.get("workers")
    machine = machine_of(view, trials, profile.nodes_per_trial if profile else 1)
    if len(alike) == len(workers) == 1 and (asked := requests(found, ranks, workers.pop(), uses, key, machine)):
        lines.append(f"next time: {', '.join(asked)}")
    return [line for line in lines if line]
