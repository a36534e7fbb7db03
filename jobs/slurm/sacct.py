"""Read from Slurm's accounting what a job was given and what it used."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from jobs.slurm.queue import ENDED, SlurmSilentError, ask

_FIELDS = ("JobID", "State", "Elapsed", "Timelimit", "TotalCPU", "AllocCPUS", "NNodes", "ReqMem", "MaxRSS", "NTasks")
_STARTED = re.compile(r"(\d+(?:_\d+)?(?:\+\d+)?)(?:\.(\w+))?$")  # a job and, if it is one, its step; before it may stand a site's text
_JOBS_AT_ONCE = 200  # the length of a command line is limited
_PAUSE_SECONDS = 1.0  # between two requests for incomplete records
_MEBIBYTES = {"": 2**-10, "K": 2**-10, "M": 1.0, "G": 2.0**10, "T": 2.0**20}


@dataclass(frozen=True)
class JobUse:
    """One job over all its starts. None means that the accounting has no value."""

    state: str  # of the last start
    seconds: float  # of all starts together
    limit_seconds: float | None  # of one start; None without a limit
    cores: int
    cpu_seconds: float | None  # used by all cores together
    memory_asked_mb: float | None  # MiB, over all nodes
    memory_used_mb: float | None  # upper bound in MiB: largest task's peak times its step's tasks
    steps: int = 0  # of the last start, as far as recorded
    running_steps: int = 0  # steps without a recorded end

    @property
    def ended(self) -> bool:
        """Return whether the last start has a recorded end, and so has each recorded step."""
        return self.state in ENDED and not self.running_steps

    @property
    def whole(self) -> bool:
        """Return whether the record is complete; never true at a site that records no steps."""
        return self.ended and self.steps > 0


def seconds_of(text: str) -> float | None:
    """Convert [days-][hours:]minutes:seconds to seconds; return None for text like UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)", text.strip())
    if found is None:
        return None
    days, hours, minutes, seconds = (float(part or 0) for part in found.groups())
    return 86400 * days + 3600 * hours + 60 * minutes + seconds


def mebibytes_of(text: str, cores: int = 1, nodes: int = 1) -> float | None:
    """Convert 206064K, 1500M or 2G, or the older 4Gc (per core) and 16Gn (per node), to MiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)([cn]?)", text.strip())
    if found is None or float(found[1]) == 0:
        return None
    return float(found[1]) * _MEBIBYTES[found[2]] * {"": 1, "c": cores, "n": nodes}[found[3]]


def _added(known: JobUse | None, start: JobUse) -> JobUse:
    """Add `start` to a job as its last start."""
    if known is None:
        return start
    cpu = [c for c in (known.cpu_seconds, start.cpu_seconds) if c is not None]
    used = [m for m in (known.memory_used_mb, start.memory_used_mb) if m is not None]
    # A partial sum would make all cores look idle.
    whole = sum(cpu) if len(cpu) == 2 else None
    return replace(start, seconds=known.seconds + start.seconds, cpu_seconds=whole, memory_used_mb=max(used, default=None))


def parse(lines: Sequence[str]) -> dict[str, JobUse]:
    """Parse sacct's lines by job: one per start, then its steps, which alone report memory."""
    found: dict[str, JobUse] = {}
    for line in lines:
        values = line.split("|")
        if len(values) != len(_FIELDS) or not (name := _STARTED.search(values[0])):
            continue
        row = dict(zip(_FIELDS, values, strict=True))
        job, step = name.groups()
        cores, nodes, tasks = (int(row[key]) if row[key].isdecimal() else 1 for key in ("AllocCPUS", "NNodes", "NTasks"))
        if step:
            if job in found:
                known, used = found[job], mebibytes_of(row["MaxRSS"])
                known = replace(known, steps=known.steps + 1, running_steps=known.running_steps + (row["State"] == "RUNNING"))
                peak = known.memory_used_mb if used is None else max(used * tasks, known.memory_used_mb or 0.0)
                found[job] = replace(known, memory_used_mb=peak)
            continue
        if row["State"] == "PENDING":
            continue
        start = JobUse(
            (row["State"].split() or [""])[0],
            seconds_of(row["Elapsed"]) or 0.0,
            seconds_of(row["Timelimit"]),
            cores,
            seconds_of(row["TotalCPU"]) or None,  # 0 where it is not gathered
            mebibytes_of(row["ReqMem"], cores, nodes),
            None,
        )
        found[job] = _added(found.get(job), start)
    return found


def used(jobs: Sequence[str], patience_seconds: float = 5.0) -> dict[str, JobUse]:
    """Return the records of `jobs`; raise SlurmError if the accounting is missing or silent."""
    found: dict[str, JobUse] = {}
    for first in range(0, len(jobs), _JOBS_AT_ONCE):
        names = ",".join(jobs[first : first + _JOBS_AT_ONCE])
        command = ["sacct", "-D", "-n", "-P", "-S", "now-60days", "-j", names, "-o", ",".join(_FIELDS)]
        found |= parse(ask(command, patience_seconds).splitlines())
    return found


def used_at_the_end(jobs: Sequence[str], wait_seconds: float) -> dict[str, JobUse]:
    """Return the records of jobs that just ended; wait up to `wait_seconds` for complete ones.

    Raise SlurmError without accounting, and SlurmSilentError if it has not answered by then.
    """
    deadline = time.monotonic() + wait_seconds
    found: dict[str, JobUse] = {}
    missing = list(jobs)
    while missing:
        silent: SlurmSilentError | None = None
        try:
            found |= used(missing, patience_seconds=0.0)
        except SlurmSilentError as error:
            silent = error
        missing = [job for job in missing if job not in found or not found[job].whole]
        if missing and time.monotonic() + _PAUSE_SECONDS > deadline:
            if silent is not None and not found:
                raise silent
            break
        if missing:
            time.sleep(_PAUSE_SECONDS)
    return found
