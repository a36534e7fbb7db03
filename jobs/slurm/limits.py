"""Ask Slurm how large an array may be, and how many jobs a user may have queued."""

import contextlib
import getpass
from collections.abc import Sequence

from jobs.cluster import ClusterProfile
from jobs.slurm.queue import Queue, SlurmError, ask, controller_parameter, show_job

_MAX_ARRAY_SIZE = 1001  # Slurm's default
_MOST_SINGLE_JOBS = 100  # for work that any number of jobs can share: each costs a call of sbatch
_ASK_SECONDS = 20.0


def array_limit() -> int:
    """Return the largest array size of this site, 0 without arrays, or Slurm's default if it does not say."""
    with contextlib.suppress(SlurmError, ValueError):
        return int(controller_parameter("MaxArraySize"))
    return _MAX_ARRAY_SIZE


def shares(workers: int, limit: int, free: int) -> list[tuple[int, int]]:
    """Return (workers, maximum at once) of each array of at most `limit` tasks.

    All arrays together run `free` at once. Those past the first `free` wait for an earlier one. If
    the site has no arrays, `limit` is at most 1: each is (1, 0), a single job.
    """
    if limit <= 1:
        return [(1, 0)] * workers
    count = -(-workers // limit)
    sizes = [workers // count + (i < workers % count) for i in range(count)]
    side_by_side = min(count, free)
    room = [free // side_by_side + (i < free % side_by_side) for i in range(side_by_side)]
    return [(size, min(size, room[i % side_by_side])) for i, size in enumerate(sizes)]


def is_cancelled_by_preemption(job: str) -> bool:
    """Return whether Slurm has preempted the job and will not start it again.

    A job that may not be requeued, or whose partition or QOS has PreemptMode=CANCEL, ends so.
    """
    with contextlib.suppress(SlurmError):
        fields = show_job(job, _ASK_SECONDS)
        if fields.get("PreemptTime", "None") in ("None", "N/A", "Unknown"):
            return False
        if fields.get("Requeue") == "0":
            return True
        partition = ask(["scontrol", "show", "partition", "-o", fields.get("Partition", "")], _ASK_SECONDS)
        modes = [word.partition("=")[2] for word in partition.split() if word.startswith("PreemptMode=")]
        modes += [mode for (mode,) in _rows("qos", [f"name={fields.get('QOS', '')}"], ["PreemptMode"])]
        return any("CANCEL" in mode.upper() for mode in modes)
    return False


def submit_limit(cluster: ClusterProfile) -> int | None:
    """Return how many jobs the user may have waiting and running at once, or None if nothing says.

    That is the least of the profile's max_queued and the limits of the association and the QOS, as
    far as the accounting lets a user read them. Each task of an array counts.
    """
    limits = [cluster.max_queued] if cluster.max_queued else []
    with contextlib.suppress(SlurmError, ValueError):
        where = [f"user={getpass.getuser()}", *([f"account={cluster.account}"] if cluster.account else [])]
        rows = _rows("assoc", where, ["MaxSubmitJobs", "GrpSubmitJobs", "DefaultQOS"])
        limits += [int(n) for *numbers, _ in rows for n in numbers if n.isdecimal()]
        qos = cluster.qos or next((name for *_, name in rows if name), "normal")
        found = _rows("qos", [f"name={qos}"], ["MaxSubmitJobsPerUser", "MaxSubmitJobsPerAccount", "GrpSubmitJobs"])
        limits += [int(n) for row in found for n in row if n.isdecimal()]
    return min(limits, default=None)


def room_for(limit: int, queue: Queue) -> int:
    """Return how many more jobs may be queued where `limit` may."""
    return max(limit - sum(not e.ended for e in queue.elements().values()), 0)


def require_room(cluster: ClusterProfile, queue: Queue) -> int | None:
    """Return how many more jobs may be queued, None without a limit; raise ValueError if none may."""
    if (limit := submit_limit(cluster)) is None:
        return None
    if not (room := room_for(limit, queue)):
        raise ValueError(f"jobs of this user that are queued must be at most {limit}; got {limit}, nothing was submitted: try again later")
    return room


def arrays_for(parts: int, cluster: ClusterProfile, room: int | None) -> list[tuple[int, int]]:
    """Return (tasks, maximum at once) of each array for work in `parts` parts, of which a task may do several.

    Of the tasks, `room` may be queued. It is one array, or single jobs, (1, 0) each, if the site has no arrays.
    """
    limit = array_limit()
    most = min(parts, limit if limit > 1 else _MOST_SINGLE_JOBS)
    size = min(most, cluster.max_parallel or most, most if room is None else room)
    return shares(size, limit, size)


def _rows(what: str, where: Sequence[str], fields: Sequence[str]) -> list[list[str]]:
    """Return the rows of one of sacctmgr's lists, of this cluster if the list is by cluster."""
    here = [f"cluster={controller_parameter('ClusterName')}"] if what == "assoc" else []
    out = ask(["sacctmgr", "-n", "-P", "show", what, "where", *where, *here, f"format={','.join(fields)}"], _ASK_SECONDS)
    rows = [line.split("|") for line in out.splitlines()]
    return [row for row in rows if len(row) == len(fields)]
