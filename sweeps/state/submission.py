"""Record submissions to Slurm. `submissions/<number>.json` holds all that a job needs.

The file is written before sbatch is called. `.job` beside it holds the array's job ID; `.void` says
that nothing was submitted. If a command is killed before it writes either, the array is found by
its name, which follows from the file.
"""

import contextlib
import hashlib
import time
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from cnnjepa.run.files import create_exclusive, read_json, reading, sealed_json, write_atomic
from cnnjepa.run.typed import build, checked
from jobs.cluster import RENAMED, Allocation, ClusterProfile
from jobs.slurm.queue import Element, Queue, SlurmError, own_job
from jobs.slurm.sbatch import Array
from sweeps.state.claims import Process
from sweeps.state.damage import cause_of
from sweeps.state.folder import Sweep
from sweeps.state.place import Place, place_of

RANK_MODULE = "sweeps.execution.worker_main"
RAY_SCRIPT = "slurm/ray_cluster.sbatch"
SUCCESSOR = "sweeps.execution.successor"
# Keys of the file, as in version 0.1 -> names here.
_KEYS = {**RENAMED, "slots": "size", "slots_per_node": "workers_per_node"}


def _renamed(values: Any) -> Any:
    return {_KEYS.get(k, k): v for k, v in values.items()} if values is not None else None


def job_prefix(sweep: Sweep) -> str:
    """Return the prefix of the names of all jobs of this sweep folder, and of no others."""
    return f"{sweep.path.name}-{hashlib.sha256(str(sweep.path).encode()).hexdigest()[:8]}-"


def last_number(sweep: Sweep) -> int:
    """Return the number of the sweep's last submission, or 0."""
    return max((int(p.stem) for p in (sweep.path / "submissions").glob("[0-9]*.json") if p.stem.isdecimal()), default=0)


@dataclass(frozen=True)
class Submission:
    """One job array of a sweep, or one allocation of nodes in which Ray places workers."""

    sweep_path: Path
    number: int
    name: str
    size: int  # tasks of the array; 1 for an allocation
    throttle: int  # tasks at once; 0 if it is a single job and no array
    after: list[str]
    cluster: ClusterProfile
    code: str
    writer: Process
    time: float
    allocation: Allocation | None = None
    # The sweep folder's path when the file was written: another one if it was moved or copied since.
    written_at: Path | None = field(default=None, compare=False)

    @property
    def place(self) -> Place:
        """Return where the folder of its jobs is, seen from the sweep folder that holds the file."""
        return place_of(self.written_at or self.sweep_path, self.sweep_path)

    @staticmethod
    def file(sweep_path: Path, number: int, what: str = "json") -> Path:
        """Return the path of one file of submission `number`."""
        return sweep_path / "submissions" / f"{number:06d}.{what}"

    @property
    def path(self) -> Path:
        """Return the path of the submission's JSON file."""
        return self.file(self.sweep_path, self.number)

    def create(self) -> bool:
        """Write the file; return False if another command took the number."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        old = {new: old for old, new in _KEYS.items()}
        values = asdict(replace(self, written_at=None), dict_factory=lambda items: {old.get(k, k): v for k, v in items})
        del values["written_at"]
        cluster = {k: v.name if isinstance(v, Enum) else v for k, v in values["cluster"].items()}
        return create_exclusive(self.path, sealed_json({**values, "sweep_path": str(self.sweep_path), "cluster": cluster}))

    @staticmethod
    def load(path: Path) -> "Submission":
        """Load a file that `create` wrote."""
        with reading(path):
            values = read_json(path)
            if f"{values['number']:06d}" != path.stem:
                raise TypeError(f"number must be that of the file; got {values['number']}")
            parts = {key: _renamed(values[key]) for key in ("cluster", "allocation")}
            here, written_at = path.parent.parent, Path(checked(str, values.pop("sweep_path"), "sweep_path"))
            found = build(Submission, {**_renamed(values), **parts}, sweep_path=here, written_at=written_at)
            code = Path(found.code)
            return replace(found, code=str(here / code.relative_to(written_at))) if code.is_relative_to(written_at) else found

    @staticmethod
    def all_of(sweep: Sweep) -> list["Submission"]:
        """Return all submissions of a sweep folder, oldest first."""
        return [Submission.load(p) for p in sorted((sweep.path / "submissions").glob("[0-9]*.json"))]

    @staticmethod
    def readable_of(sweep: Sweep) -> tuple[list["Submission"], list[str]]:
        """Return the submissions that can be read, and a line for each that cannot."""
        found, damaged = [], []
        for path in sorted((sweep.path / "submissions").glob("[0-9]*.json")):
            try:
                found.append(Submission.load(path))
            except ValueError as error:
                damaged.append(cause_of(error, sweep.path))
        return found, damaged

    @property
    def job(self) -> str:
        """Return the array's job ID, or "" until it is recorded."""
        path = self.file(self.sweep_path, self.number, "job")
        return path.read_text().strip() if path.exists() else ""

    def write_job(self, job: str) -> None:
        """Record the array's job ID."""
        write_atomic(self.file(self.sweep_path, self.number, "job"), job + "\n")

    def listed(self, queue: Queue) -> Element | None:
        """Return an element of the array that `queue` lists by its name, or None.

        A job that is older than this submission is one of a folder that was here before.
        """
        return next((e for e in queue.named(self.name) if e.name == self.name and not e.is_older_than(self.time)), None)

    @property
    def is_void(self) -> bool:
        """Return whether it is known that nothing was submitted."""
        return self.file(self.sweep_path, self.number, "void").exists()

    def write_void(self, full: bool = False) -> None:
        """Record that nothing was submitted, and whether because too many jobs were queued."""
        write_atomic(self.file(self.sweep_path, self.number, "void"), "full\n" if full else "")

    @property
    def was_full(self) -> bool:
        """Return whether nothing was submitted because too many jobs were queued."""
        return self.is_void and self.file(self.sweep_path, self.number, "void").read_text() != ""

    @property
    def age_seconds(self) -> float:
        """Return the seconds since the file was written, by the writer's clock and ours."""
        return time.time() - self.time

    @property
    def worker_profile(self) -> ClusterProfile:
        """Return the resources of one worker."""
        return self.allocation.part(self.cluster) if self.allocation else self.cluster

    @property
    def job_profile(self) -> ClusterProfile:
        """Return the resources that one job requests from Slurm."""
        return self.allocation.whole(self.cluster) if self.allocation else self.cluster

    @property
    def what(self) -> str:
        """Return '33 workers, 8 at once' or '3 nodes, 12 workers at once'."""
        if self.allocation:
            return f"{self.allocation.nodes} nodes, {self.allocation.workers} workers at once"
        return f"{self.size} workers, {self.throttle} at once" if self.throttle else "1 worker, as a job of its own"

    @property
    def log_folder(self) -> Path:
        """Return the folder of the jobs' output."""
        return self.sweep_path / "log"

    def log_of_this_job(self) -> str:
        """Return the output file of this process's job."""
        return str(self.log_folder / f"{own_job()}.log")

    def array(self) -> Array:
        """Return the array that jobs/slurm/sbatch.py renders and submits."""
        workers, script = (self.allocation.workers, RAY_SCRIPT) if self.allocation else (self.size, "")
        comment, after = f"{workers} workers of {self.sweep_path}", tuple(self.after)
        nodes, made = str(self.sweep_path / "nodes"), (self.name, self.size, self.throttle, RANK_MODULE, str(self.path), Path(self.code))
        return Array(*made, self.log_folder, comment, after, script, SUCCESSOR, nodes)


def moved_line(sweep: Sweep, queue: Queue | None) -> str:
    """Return which jobs wait or run that were submitted before the sweep folder was moved, and what to do, or ""."""
    before = {s.name: s.written_at for s in Submission.readable_of(sweep)[0] if s.place is Place.gone}
    left: list[Element] = []
    if before and queue is not None:
        with contextlib.suppress(SlurmError):
            left = [e for e in queue.named("") if e.name in before and not e.ended]
    if not left:
        return ""
    where, jobs = before[left[0].name], " ".join(sorted({e.array for e in left}))
    return f"{len(left)} jobs were submitted when this folder was {where}, and cannot find it; to end them: scancel {jobs}"
