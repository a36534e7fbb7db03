"""Decide who owns a trial. Exactly one process wins a claim, on a local disk, NFS or Lustre.

A claim is the file `trials/<run ID>/claim/<attempt>.json`, created whole and exclusively. The
highest attempt owns the trial, and its owner touches the file every HEARTBEAT_SECONDS. A process
that finds the owner dead creates the next attempt.

Slurm says whether an owner in a Slurm job lives. Without Slurm, for jobs of another cluster, and for
one worker of a running job that has many, the process table decides on this machine and the
heartbeat elsewhere. A job is known by its cluster, its name and its number.
"""

import contextlib
import itertools
import json
import os
import platform
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from cnnjepa.run.files import create_exclusive, read_json, reading, sealed_json
from cnnjepa.run.typed import build, checked
from jobs.slurm.queue import ENDED, GONE, UNLISTED, Queue, own_job, own_restart
from sweeps.state.place import Place, place_of

HEARTBEAT_SECONDS = 20.0
# An owner on another host is dead after so long without a heartbeat, timed by our own clock.
SILENCE_SECONDS = 600.0
# So is an owner in a job unknown to Slurm. The limit allows for clocks that differ between nodes.
STALE_SECONDS = 180.0
_NUMBER = re.compile(r"[0-9]{6,9}")


@dataclass(frozen=True)
class Process:
    """A process, identified beyond its PID: across reboots, containers and reused PIDs."""

    host: str
    boot: str
    namespace: str  # PID namespace: a container has its own
    pid: int
    started: float

    @staticmethod
    def me() -> "Process":
        """Return this process."""
        return Process(platform.node(), _boot(), _namespace(), os.getpid(), psutil.Process().create_time())

    @property
    def driver(self) -> str:
        """Return the name of this process as a driver of workers."""
        return json.dumps(asdict(self))

    @property
    def is_local(self) -> bool:
        """Return whether our process table can tell if the process lives."""
        return (self.host, self.boot, self.namespace) == (platform.node(), _boot(), _namespace())

    def lives(self) -> bool:
        """Return whether a local process still runs; a zombie does not."""
        assert self.is_local
        try:
            found = psutil.Process(self.pid)
            return abs(found.create_time() - self.started) < 1 and found.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _boot() -> str:
    """Return an ID that changes with each boot, or "" if the system has none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> str:
    """Return the name of this process's PID namespace, or "" if the system has only one."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


@dataclass(frozen=True)
class SlurmStart:
    """One start of a Slurm job. A requeued job keeps its ID and gets a higher restart count."""

    cluster: str
    job: str  # 17, or 17_3 for an array task
    restart: int
    node: str
    gpus: float  # held by the owner
    log: str  # output file of the job
    code: str  # snapshot that the job runs
    # The job also runs other trials: those of an allocation, or of a search's worker.
    shared: bool = False
    name: str = ""  # of the job, with which its number is looked up; "" before version 0.2

    @staticmethod
    def me(gpus: float, log: str, code: str, environment: Mapping[str, str] = os.environ, shared: bool = False) -> "SlurmStart | None":
        """Return the start that this process belongs to, or None outside Slurm."""
        job = own_job(environment)
        if not job:
            return None
        node = environment.get("SLURMD_NODENAME" if shared else "SLURM_JOB_NODELIST", platform.node())
        cluster, name = environment.get("SLURM_CLUSTER_NAME", ""), environment.get("SLURM_JOB_NAME", "")
        return SlurmStart(cluster, job, own_restart(environment), node, gpus, log, code, shared, name)

    def place(self, folder: Path) -> Place:
        """Return where the job's sweep folder, in whose log/ its output is, is seen from the sweep folder `folder`."""
        output = Path(self.log)
        return place_of(output.parent.parent, folder) if output.parent.name == "log" else Place.here

    def output(self, folder: Path) -> Path:
        """Return the job's output file, in the sweep folder `folder` if that was moved or copied."""
        return Path(self.log) if self.place(folder) is Place.here else folder / "log" / Path(self.log).name

    @property
    def driver(self) -> str:
        """Return who started the process: the supervisor in this start of the job."""
        return f"slurm {self.cluster} job {self.job} restart {self.restart}"


@dataclass(frozen=True)
class Claim:
    """One attempt of a trial: its owner, the owner's driver, the start time and the first step."""

    attempt: int
    owner: Process
    # A death under the same driver is the trial's own fault; one that took the driver along is not.
    driver: str
    step: int
    time: float  # on the owner's clock, seconds since 1970
    slurm: SlurmStart | None = None

    @staticmethod
    def from_dict(values: Mapping[str, Any], attempt: int) -> "Claim":
        """Build the claim from the JSON values of file `attempt`; raise TypeError if they are not of it."""
        if checked(int, values["epoch"], "epoch") != attempt:  # the key's name since 0.1
            raise TypeError(f"epoch must be the number in the file's name; got {values['epoch']}")
        known = {**{k: v for k, v in values.items() if k != "epoch"}, "attempt": attempt}
        if isinstance(known["slurm"], dict):
            given = {"name": "", **known["slurm"]}
            known["slurm"] = {f.name: given[f.name] for f in fields(SlurmStart)}
        return build(Claim, known)


def listing(trial_dir: Path) -> frozenset[str]:
    """Return the names of all files in the trial's claim folder. Their contents never change."""
    try:
        return frozenset(os.listdir(trial_dir / "claim"))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def history(trial_dir: Path, names: frozenset[str] | None = None, known: Sequence[Claim] = ()) -> list[Claim]:
    """Return all claims of a trial, oldest first. Claims in `known` are not read again."""
    names = listing(trial_dir) if names is None else names
    claims = list(known)
    for attempt in sorted(_attempts(names, "json") - {c.attempt for c in known}):
        path = _path(trial_dir, attempt)
        with reading(path):
            claims.append(Claim.from_dict(read_json(path), attempt))
    return claims


def held_seconds(trial_dir: Path, claim: Claim) -> float:
    """Return the seconds from the claim to the owner's last sign of life."""
    last = max((p.stat().st_mtime for p in _signs(trial_dir, claim)), default=claim.time)
    return max(last - claim.time, 0.0)


def _signs(trial_dir: Path, claim: Claim) -> list[Path]:
    """Return the files of the claim whose times are its owner's signs of life."""
    signs = [_path(trial_dir, claim.attempt, what) for what in ("json", "released", "crashed")]
    return [p for p in signs if p.exists()]


def _beats(trial_dir: Path, claim: Claim) -> bool:
    """Return whether the owner's last sign of life is recent, by our clock."""
    return abs(time.time() - max(p.stat().st_mtime for p in _signs(trial_dir, claim))) <= STALE_SECONDS


def _ended(names: frozenset[str], attempt: int) -> str:
    """Return "released" or "crashed" as the owner recorded it, else ""."""
    return next((way for way in ("released", "crashed") if _name(attempt, way) in names), "")


def _name(attempt: int, what: str) -> str:
    return f"{attempt:06d}.{what}"


def _path(trial_dir: Path, attempt: int, what: str = "json") -> Path:
    return trial_dir / "claim" / _name(attempt, what)


def _attempts(names: frozenset[str], what: str) -> set[int]:
    """Return the attempts that have a file of that kind; files of any other name are passed over."""
    numbers = {n.removesuffix(f".{what}") for n in names if n.endswith(f".{what}")}
    return {int(n) for n in numbers if _NUMBER.fullmatch(n) and n == f"{int(n):06d}"}


def _last_attempt(names: frozenset[str], what: str) -> int:
    """Return the last attempt that has a file of that kind, or -1."""
    return max(_attempts(names, what), default=-1)


def cancel(trial_dir: Path) -> None:
    """Keep every process from running the trial until `uncancel`. A live owner saves and stops."""
    attempt = max(_last_attempt(listing(trial_dir), "json"), 0)
    (trial_dir / "claim").mkdir(parents=True, exist_ok=True)
    _path(trial_dir, attempt, "resumed").unlink(missing_ok=True)
    _path(trial_dir, attempt, "cancelled").touch()


def uncancel(trial_dir: Path) -> None:
    """Let a cancelled trial run again and forgive what ended its last job."""
    if (trial_dir / "claim").exists():
        _path(trial_dir, max(_last_attempt(listing(trial_dir), "json"), 0), "resumed").touch()


def is_cancelled(trial_dir: Path, names: frozenset[str] | None = None) -> bool:
    """Return whether the trial was cancelled and not resumed since."""
    names = listing(trial_dir) if names is None else names
    return _last_attempt(names, "cancelled") > _last_attempt(names, "resumed")


class Standing(Enum):
    """State of a claim's owner; the value is that of the trial's TrialState."""

    alive = "running"
    requeued = "requeued"  # its Slurm job waits in the queue and will go on with the trial
    cancelled = "cancelled"  # a person cancelled its Slurm job
    dead = "interrupted"


class Watch:
    """Judges whether owners live.

    Keep one instance: it times the silence of owners on other hosts. `silent` holds the claims
    found dead this way; pass it to processes that have not watched for so long.
    """

    def __init__(self, silent: frozenset[Path] = frozenset(), silence_seconds: float = SILENCE_SECONDS, queue: Queue | None = None) -> None:
        """Without `queue`, judge owners in Slurm jobs by the process table and heartbeats."""
        self.silent, self.queue = silent, queue
        self._silence = silence_seconds
        self._seen: dict[Path, tuple[float, float]] = {}

    def standing(self, trial_dir: Path, claim: Claim, names: frozenset[str] | None = None) -> Standing:
        """Return the state of the owner of `claim`."""
        names = listing(trial_dir) if names is None else names
        if is_cancelled(trial_dir, names):
            return Standing.cancelled
        if claim.slurm is not None and (place := claim.slurm.place(trial_dir.parent.parent)) is not Place.here:
            return self._standing_elsewhere(trial_dir, claim, claim.slurm, place, names)
        if claim.slurm is not None and claim.slurm.cluster == os.environ.get("SLURM_CLUSTER_NAME") and claim.slurm.job == own_job():
            return Standing.alive if self._lives_in_this_job(trial_dir, claim, claim.slurm, names) else Standing.dead
        if claim.slurm is not None and self.queue is not None and not self.queue.is_elsewhere(claim.slurm.cluster):
            return self._standing_in_slurm(trial_dir, claim, claim.slurm, self.queue, names)
        return Standing.alive if self._lives(trial_dir, claim, names) else Standing.dead

    def _standing_elsewhere(self, trial_dir: Path, claim: Claim, start: SlurmStart, place: Place, names: frozenset[str]) -> Standing:
        """Return the state of an owner whose job knows another folder, or none, unless this one has another name there."""
        if place is Place.elsewhere or _ended(names, claim.attempt):
            return Standing.dead
        queue = self.queue if self.queue is not None and not self.queue.is_elsewhere(start.cluster) else None
        state = queue.state(start.job, start.name) if queue is not None else ""
        over = state in ENDED or state == "PENDING" or not _beats(trial_dir, claim)
        return Standing.dead if over else Standing.alive

    def mark_dead(self, trial_dir: Path, claim: Claim) -> None:
        """Mark the owner of `claim` dead. The caller knows that it does not run."""
        self.silent |= {_path(trial_dir, claim.attempt)}

    def _lives_in_this_job(self, trial_dir: Path, claim: Claim, start: SlurmStart, names: frozenset[str]) -> bool:
        """Return whether the owner, in this process's own job, runs. Earlier starts are over."""
        if start.shared:
            return start.restart == own_restart() and self._lives(trial_dir, claim, names)
        return claim.owner == Process.me() and not _ended(names, claim.attempt)

    def _standing_in_slurm(self, trial_dir: Path, claim: Claim, start: SlurmStart, queue: Queue, names: frozenset[str]) -> Standing:
        ended = bool(_ended(names, claim.attempt))
        state = queue.state(start.job, start.name) if start.name else queue.state(start.job)
        if state == "CANCELLED" and _name(claim.attempt, "resumed") not in names:
            with contextlib.suppress(OSError):
                _path(trial_dir, claim.attempt, "cancelled").touch()  # Slurm forgets it in minutes
            return Standing.cancelled
        if state in ENDED:
            return Standing.dead
        if state in (GONE, UNLISTED):
            # The job is missing from an answer, another user's, or long over: the heartbeat
            # decides. Before the second look, what has saved may be waiting to start again.
            if ended:
                return Standing.requeued if state == UNLISTED and _beats(trial_dir, claim) else Standing.dead
            return Standing.alive if _beats(trial_dir, claim) else Standing.dead
        if not state:  # Slurm has not answered
            return Standing.requeued if ended else Standing.alive
        current = state in ("RUNNING", "SUSPENDED", "STOPPED") and queue.restarts(start.job) == start.restart
        # The job goes on with its other workers. Any of them may resume what a dead one left.
        if current and start.shared:
            return Standing.alive if self._lives(trial_dir, claim, names) else Standing.dead
        return Standing.alive if current and not ended else Standing.requeued

    def _lives(self, trial_dir: Path, claim: Claim, names: frozenset[str]) -> bool:
        """Return whether the owner runs: by the process table here, by its heartbeat elsewhere."""
        if _ended(names, claim.attempt):
            return False
        if claim.owner.host == platform.node() and claim.owner.boot != _boot():
            return False  # the machine has rebooted since
        if claim.owner.is_local:
            return claim.owner.lives()
        path, now = _path(trial_dir, claim.attempt), time.monotonic()
        if path in self.silent:
            return False
        beat = path.stat().st_mtime
        known, since = self._seen.get(path, (None, now))
        if beat != known:
            since = now
        self._seen[path] = beat, since
        if now - since >= self._silence:
            self.silent |= {path}
        return path not in self.silent


class Ownership:
    """A won claim. Inside the `with` block the heartbeat runs; at its end the claim is released."""

    def __init__(self, trial_dir: Path, claim: Claim) -> None:
        self.trial_dir, self.claim = trial_dir, claim
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._keep_beating, daemon=True)

    def _keep_beating(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(_path(self.trial_dir, self.claim.attempt))

    def lost(self) -> bool:
        """Return whether the trial was taken over or cancelled."""
        return _path(self.trial_dir, self.claim.attempt + 1).exists() or is_cancelled(self.trial_dir)

    def __enter__(self) -> "Ownership":
        self._beat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        # If this fails, the end of this process says the same later.
        with contextlib.suppress(OSError):
            _path(self.trial_dir, self.claim.attempt, "crashed" if error else "released").touch()


def claim(trial_dir: Path, attempt: int, driver: str, step: int, slurm: SlurmStart | None = None) -> Ownership | None:
    """Claim `attempt`, one more than the trial's last; return None if another process won it."""
    (trial_dir / "claim").mkdir(parents=True, exist_ok=True)
    won = Claim(attempt, Process.me(), driver, step, time.time(), slurm)
    values = asdict(won)
    text = sealed_json({"epoch": values.pop("attempt"), **values})
    return Ownership(trial_dir, won) if create_exclusive(_path(trial_dir, attempt), text) else None


def crashes_in_place(claims: list[Claim], step: int, driver: str, trial_dir: Path) -> int:
    """Count the last claims that died under this driver without getting past `step`.

    A claim that was released, or whose driver died too, is no fault of the trial.
    """
    names = listing(trial_dir)

    def died(past: Claim) -> bool:
        forgiven = _ended(names, past.attempt) == "released" or _name(past.attempt, "resumed") in names
        return past.step == step and past.driver == driver and not forgiven

    return len(list(itertools.takewhile(died, reversed(claims))))


def starts_in_vain(claims: list[Claim], step: int, trial_dir: Path) -> int:
    """Count the last claims that were Slurm jobs and never got past `step`, whatever ended them.

    Claims from before the last `uncancel` do not count.
    """
    names = listing(trial_dir)

    def in_vain(past: Claim) -> bool:
        return past.step == step and past.slurm is not None and _name(past.attempt, "resumed") not in names

    return len(list(itertools.takewhile(in_vain, reversed(claims))))
