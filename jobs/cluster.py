"""Describe a cluster (ClusterProfile) and one run on it (JobSpec)."""

import math
import re
import shlex
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from cnnjepa.run.ranks import Device
from jobs.cli import require_printable
from jobs.task import task_of


class Scheduler(Enum):
    """What places the workers: Ray on this machine (local), or Slurm."""

    local = "local"
    slurm = "slurm"


@dataclass
class ClusterProfile:
    """One cluster, as a file of slurm/cluster describes it. A worker runs one trial at a time."""

    name: str  # file name without .yaml
    scheduler: Scheduler = Scheduler.local
    nodes_per_trial: int = 1
    ranks_per_trial: int = 1  # processes of one trial over all its nodes; tasks on Slurm
    cores_per_trial: int = 1  # over all its nodes; each rank uses an equal share as CPU threads
    gpus_per_trial: float = 0.0  # over all its nodes; on this machine, a fraction shares a device
    memory_gb_per_trial: float = 2.0  # host memory over all its nodes, in 10^9 bytes
    device: Device = Device.auto  # of each rank; with cuda, a run fails without a GPU; with auto, it would use the CPU
    max_parallel: int = 0  # trials at once; 0: as many as the machine or the queue allows
    max_queued: int = 0  # Slurm only: your jobs, waiting or running, that the site allows at once; 0: as Slurm says
    runs_dir: str = "runs"  # folder of sweeps and single runs, seen by all nodes; --runs-dir overrides it
    data_root: str = ""  # folder of the image sets; data.root overrides it
    local_scratch: str = ""  # folder on each node's own disk, such as /tmp or $TMPDIR, for copies of packed sets; "": no copies
    # Slurm only:
    required: list[str] = field(default_factory=list)  # keys of this profile that the user must give
    account: str = ""  # account to charge; "": the site's default
    partition: str = ""  # "": the site's default
    qos: str = ""  # "": the account's default
    gres: str = ""  # generic resources per node; "": gpu:<GPUs per node>, if it has any
    time_limit_minutes: int = 60  # of one job; a longer run continues in the next job
    stop_signal_seconds: int = 120  # how long before the limit the run is told to save; Slurm may signal up to 60 s earlier
    setup: list[str] = field(default_factory=list)  # shell lines before the run, such as module load
    python: str = ""  # shell words that start Python on a node, such as a container's; "": the submitting Python
    export: list[str] = field(default_factory=list)  # further variables of the submitting environment that a job gets
    sbatch: dict[str, Any] = field(default_factory=dict)  # further sbatch options, such as {constraint: a100, exclude: node7}

    @property
    def gpus_per_node(self) -> int:
        """Return the whole GPUs that a worker takes on each of its nodes."""
        return int(self.gpus_per_trial) // self.nodes_per_trial

    @property
    def threads_per_rank(self) -> int:
        """Return the CPU threads of one rank."""
        return self.cores_per_trial // self.ranks_per_trial


# Keys of version 0.1, which files on disk keep -> their names here.
RENAMED = {f"{what}_per_slot": f"{what}_per_trial" for what in ("nodes", "ranks", "cores", "gpus", "memory_gb")}


@dataclass(frozen=True)
class Allocation:
    """One Slurm job whose nodes many workers share; each worker is one rank on at most one GPU."""

    nodes: int
    workers_per_node: int

    @staticmethod
    def of(cluster: ClusterProfile, nodes: int, workers_per_node: int | None) -> "Allocation":
        """Build an allocation, by default with one worker per GPU, or per core without GPUs.

        Raise ValueError if the sizes do not fit a node.
        """
        cores, gpus = cluster.cores_per_trial // cluster.nodes_per_trial, cluster.gpus_per_node
        workers = (gpus or cores) if workers_per_node is None else workers_per_node
        if nodes < 1:
            raise ValueError(f"--nodes must be at least 1; got {nodes}")
        if not 1 <= workers <= cores:
            raise ValueError(f"--trials-per-node must lie in [1, {cores}], the cores of a node; got {workers}")
        if gpus and workers % gpus:
            rule = f"be a multiple of the {gpus} GPUs of a node, since a trial uses at most one GPU"
            raise ValueError(f"--trials-per-node must {rule}; got {workers}: for several GPUs per trial use --backend array")
        return Allocation(nodes, workers)

    @property
    def workers(self) -> int:
        """Return the number of workers on all nodes."""
        return self.nodes * self.workers_per_node

    def whole(self, cluster: ClusterProfile) -> ClusterProfile:
        """Return the profile of the whole job: all of its nodes, with one task on each."""
        share = self.nodes / cluster.nodes_per_trial
        return replace(
            cluster,
            nodes_per_trial=self.nodes,
            ranks_per_trial=self.nodes,
            cores_per_trial=cluster.cores_per_trial // cluster.nodes_per_trial * self.nodes,
            gpus_per_trial=float(cluster.gpus_per_node * self.nodes),
            memory_gb_per_trial=cluster.memory_gb_per_trial * share,
        )

    def part(self, cluster: ClusterProfile) -> ClusterProfile:
        """Return the profile of one worker; Ray counts GPUs in 1/10,000, so round down."""
        return replace(
            cluster,
            nodes_per_trial=1,
            ranks_per_trial=1,
            cores_per_trial=cluster.cores_per_trial // cluster.nodes_per_trial // self.workers_per_node,
            gpus_per_trial=math.floor(10_000 * cluster.gpus_per_node / self.workers_per_node) / 10_000,
            memory_gb_per_trial=cluster.memory_gb_per_trial / cluster.nodes_per_trial / self.workers_per_node,
            max_parallel=self.workers,
        )


@dataclass(frozen=True)
class JobSpec:
    """One run: what to train, on which cluster, and in which folder."""

    train: Any  # a task's configuration
    cluster: ClusterProfile
    run_dir: Path
    retry_failed: bool = False
    start_again: bool = False


def fit_to(cluster: ClusterProfile, train: Any, beside_others: bool = False) -> None:
    """Set the threads, the device and the data folder of `train` from the profile."""
    task = task_of(train)
    task.put(train, "threads", cluster.threads_per_rank)
    task.put(train, "data_root", task.get(train, "data_root", "") or cluster.data_root)
    # Without GPUs of their own, runs side by side use the CPU: all would crowd the first device.
    if task.get(train, "device", None) is Device.auto and (cluster.scheduler is Scheduler.slurm or beside_others):
        task.put(train, "device", cluster.device if cluster.gpus_per_trial else Device.cpu)


# sbatch interprets these in #SBATCH lines, even within quotes; a colon would split PYTHONPATH.
_LOST_IN_SBATCH = frozenset("\\#:'\"")
# Upper bounds that no site reaches.
_MOST = dict.fromkeys(("nodes_per_trial", "ranks_per_trial", "cores_per_trial", "gpus_per_trial", "memory_gb_per_trial"), 1_000_000)
_MOST |= {"max_parallel": 1_000_000, "max_queued": 1_000_000, "time_limit_minutes": 5_000_000}
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_SITE_WORD = re.compile(r"[\w][\w.,:+=@/()*\[\]-]*")
# Without these a job, or its log, would not be found again.
_OF_THE_LAUNCHER = frozenset({"array", "dependency", "job-name", "output", "parsable", "test-only", "wait", "wrap"})
_SBATCH_OPTION = re.compile(r"[A-Za-z][A-Za-z-]*")


def require_sbatch_path(path: Path, key: str) -> None:
    """Raise ValueError at a path with characters that a batch script cannot carry."""
    bad = sorted({c for c in str(path) if c in _LOST_IN_SBATCH or not c.isprintable()})
    if bad:
        rule = f"not contain {' '.join(map(repr, bad))} on Slurm, which a batch script cannot hold"
        raise ValueError(f"{key} must {rule}; got {str(path)!r}: choose a folder without them")


def validate_words(cluster: ClusterProfile) -> None:
    """Raise ValueError at a value that would break its line; `setup` and `python` are shell."""
    for key in ("account", "partition", "qos", "gres"):
        value = getattr(cluster, key)
        if value and not _SITE_WORD.fullmatch(value):
            raise ValueError(f"cluster.{key} must be a word of letters, digits and .,:+=@/()*[]-; got {value!r}")
    for option, value in cluster.sbatch.items():
        if not isinstance(option, str) or not _SBATCH_OPTION.fullmatch(option.replace("_", "-")):
            raise ValueError(f"cluster.sbatch must have long options of sbatch as keys; got {option!r}")
        if (value is not None and not isinstance(value, (str, int, float, bool))) or not str(value).isprintable() or value == "":
            rule = "be one line of printable text, a number, true for a flag, or false or null to leave it out"
            raise ValueError(f"cluster.sbatch.{option} must {rule}; got {value!r}")
        if (name := option.replace("_", "-")) in _OF_THE_LAUNCHER:
            raise ValueError(f"cluster.sbatch must leave {', '.join(sorted(_OF_THE_LAUNCHER))} to the launcher; got {name}")
    for key in ("runs_dir", "data_root", "local_scratch", "python"):
        require_printable(getattr(cluster, key), f"cluster.{key}")
    for name in cluster.export:
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"cluster.export must hold names of variables; got {name!r}")
    for line in cluster.setup:
        require_printable(line, "cluster.setup")
    try:
        shlex.split(cluster.python)
    except ValueError as error:
        raise ValueError(f"cluster.python must be shell words; got {cluster.python!r}: {error}") from error


def validate_cluster(cluster: ClusterProfile) -> None:
    """Raise ValueError with key, rule and value if no worker can run with this profile."""
    validate_words(cluster)
    c, slurm = cluster, cluster.scheduler is Scheduler.slurm
    for key in ("cores_per_trial", "ranks_per_trial", "nodes_per_trial"):  # divisors below
        if getattr(c, key) < 1:
            raise ValueError(f"cluster.{key} must be at least 1; got {getattr(c, key)}")
    rules = [
        (0 <= c.gpus_per_trial < float("inf"), "gpus_per_trial", "be at least 0 and finite"),
        (0.01 <= c.memory_gb_per_trial < float("inf"), "memory_gb_per_trial", "be at least 0.01 and finite"),
        (c.max_parallel >= 0, "max_parallel", "be at least 0"),
        (c.max_queued >= 0, "max_queued", "be at least 0"),
        (c.local_scratch[:1] in ("", "/", "$"), "local_scratch", "be an absolute path, or begin with $ as in $TMPDIR"),
    ]
    if slurm:
        whole = c.gpus_per_trial % c.nodes_per_trial == 0  # False if not finite
        limit = 60 * c.time_limit_minutes
        rules += [
            (whole, "gpus_per_trial", f"be whole GPUs, the same for each of {c.nodes_per_trial} nodes"),
            (not c.ranks_per_trial % c.nodes_per_trial, "ranks_per_trial", f"be a multiple of {c.nodes_per_trial} nodes"),
            (not c.cores_per_trial % c.ranks_per_trial, "cores_per_trial", f"be a multiple of {c.ranks_per_trial} ranks"),
            (c.time_limit_minutes >= 1, "time_limit_minutes", "be at least 1"),
            (1 <= c.stop_signal_seconds < limit, "stop_signal_seconds", f"lie in [1, {limit}), within time_limit_minutes"),
        ]
    else:
        # A worker on this machine trains one rank.
        rules += [
            (c.gpus_per_trial <= 1, "gpus_per_trial", "lie in [0, 1]"),
            (c.ranks_per_trial == 1, "ranks_per_trial", "be 1 on this machine; torchrun starts more"),
        ]
    rules += [(getattr(c, key) <= most, key, f"be at most {most}") for key, most in _MOST.items()]
    for holds, key, rule in rules:
        if not holds:
            raise ValueError(f"cluster.{key} must {rule}; got {getattr(c, key)}")
