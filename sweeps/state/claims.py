"""Who owns a trial: claims that exactly one process wins, on a local disk and on NFS or Lustre alike.

`trials/<signature>/claim/<epoch>.json` is created whole and exclusively; the highest epoch owns the trial. An owner touches its file
every HEARTBEAT_SECONDS. Whoever finds the owner dead creates the next epoch; of two who try, one fails. Whether an owner in a Slurm job
lives is asked of Slurm, on this machine of the process table, and only elsewhere of the clock; so too of one slot of a running job that has
many.
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from types import TracebackType

import psutil

from cnnjepa.run.files import create_exclusive, read_json, reading, to_json
from jobs.slurm.queue import ENDED, GONE, Queue, own_job, own_restart

HEARTBEAT_SECONDS = 20.0
# An owner on another host is taken for dead only if its heartbeat stood still for so long on our own clock.
SILENCE_SECONDS = 600.0
# One in a job that Slurm does not know, if its heart has not beaten for so long, whatever the clocks of two nodes differ by.
STALE_SECONDS = 180.0


@dataclass(frozen=True)
class Process:
    """A process, told apart from a later one of the same number, also after a reboot or in another container."""

    host: str
    boot: str
    namespace: str  # of process numbers: a container has its own
    pid: int
    started: float

    @staticmethod
    def me() -> "Process":
        """This process."""
        return Process(platform.node(), _boot(), _namespace(), os.getpid(), psutil.Process().create_time())

    @property
    def driver(self) -> str:
        """This process as the driver of slots."""
        return json.dumps(asdict(self))

    @property
    def is_local(self) -> bool:
        """Whether our process table can tell if it lives."""
        return (self.host, self.boot, self.namespace) == (platform.node(), _boot(), _namespace())

    def lives(self) -> bool:
        """Whether a local process is still running; a zombie is not."""
        assert self.is_local
        try:
            found = psutil.Process(self.pid)
            return abs(found.create_time() - self.started) < 1 and found.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _boot() -> str:
    """Changes with each start of the machine; "" where the system does not tell."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> str:
    """Names the process table that this process sees; "" where the system has but one."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


@dataclass(frozen=True)
class SlurmStart:
    """One start of a Slurm job: a requeued job has the same id and a higher restart."""

    cluster: str
    job: str  # 17, or 17_3 for an array's element
    restart: int
    node: str
    gpus: float  # that the owner holds
    log: str  # what the job prints
    code: str  # the snapshot that it runs
    shared: bool = False  # whether the job has other trials too: an allocation of many slots, or a search's slot, which takes one by one

    @staticmethod
    def me(gpus: float, log: str, code: str, environment: Mapping[str, str] = os.environ, shared: bool = False) -> "SlurmStart | None":
        """The start that this process belongs to; None outside of Slurm."""
        job = own_job(environment)
        if not job:
            return None
        node = environment.get("SLURMD_NODENAME" if shared else "SLURM_JOB_NODELIST", platform.node())
        return SlurmStart(environment.get("SLURM_CLUSTER_NAME", ""), job, own_restart(environment), node, gpus, log, code, shared)

    @property
    def driver(self) -> str:
        """Who started the process: the supervisor in this start of the job."""
        return f"slurm {self.cluster} job {self.job} restart {self.restart}"


@dataclass(frozen=True)
class Claim:
    """One epoch of ownership: who trains, on whose behalf, since when, and the step from which it started."""

    epoch: int
    owner: Process
    driver: str  # a death under the same driver is the trial's own; one that the driver shares is not
    step: int
    time: float  # of the owner's clock, seconds since 1970
    slurm: SlurmStart | None = None


def listing(trial_dir: Path) -> frozenset[str]:
    """The names of all files about a trial's ownership, of which none ever changes its content; asked of the system in one request."""
    try:
        return frozenset(os.listdir(trial_dir / "claim"))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def history(trial_dir: Path, names: frozenset[str] | None = None, known: Sequence[Claim] = ()) -> list[Claim]:
    """All claims of a trial, oldest first; of those in `names`, the folder's listing, only what is not `known` is read."""
    names = listing(trial_dir) if names is None else names
    read = {c.epoch for c in known}
    claims = list(known)
    for name in sorted(n for n in names if n.endswith(".json") and n.removesuffix(".json").isdecimal()):
        if int(name.removesuffix(".json")) in read:
            continue
        path = trial_dir / "claim" / name
        with reading(path):
            values = read_json(path)
            held = values["slurm"]
            start = SlurmStart(**{f.name: held[f.name] for f in fields(SlurmStart)}) if held else None
            claims.append(Claim(values["epoch"], Process(**values["owner"]), values["driver"], values["step"], values["time"], start))
    return claims


def held_seconds(trial_dir: Path, claim: Claim) -> float:
    """How long the owner is known to have held the trial: from its claim to its last sign of life."""
    signs = [_path(trial_dir, claim.epoch, what) for what in ("json", "released", "crashed")]
    last = max(p.stat().st_mtime for p in signs if p.exists())
    return max(last - claim.time, 0.0)


def _ended(names: frozenset[str], epoch: int) -> str:
    """'released' or 'crashed' where the owner has said so, else ''."""
    return next((way for way in ("released", "crashed") if _name(epoch, way) in names), "")


def _name(epoch: int, what: str) -> str:
    return f"{epoch:06d}.{what}"


def _path(trial_dir: Path, epoch: int, what: str = "json") -> Path:
    return trial_dir / "claim" / _name(epoch, what)


def _last_epoch(names: frozenset[str], what: str) -> int:
    """The last claim that has a file of that kind, -1 where none has."""
    return max((int(n.partition(".")[0]) for n in names if n.endswith("." + what) and n.partition(".")[0].isdecimal()), default=-1)


def cancel(trial_dir: Path) -> None:
    """Nobody shall run the trial until `uncancel`; its owner, if any, saves and stops."""
    epoch = max(_last_epoch(listing(trial_dir), "json"), 0)
    (trial_dir / "claim").mkdir(parents=True, exist_ok=True)
    _path(trial_dir, epoch, "resumed").unlink(missing_ok=True)
    _path(trial_dir, epoch, "cancelled").touch()


def uncancel(trial_dir: Path) -> None:
    """A cancelled trial may run again; what ended its last job is no longer held against it."""
    if (trial_dir / "claim").exists():
        _path(trial_dir, max(_last_epoch(listing(trial_dir), "json"), 0), "resumed").touch()


def is_cancelled(trial_dir: Path, names: frozenset[str] | None = None) -> bool:
    """Whether the trial was cancelled and not taken up again since, whoever has claimed it meanwhile."""
    names = listing(trial_dir) if names is None else names
    return _last_epoch(names, "cancelled") > _last_epoch(names, "resumed")


class Standing(Enum):
    """What became of an owner."""

    alive = "alive"
    requeued = "requeued"  # its Slurm job waits in the queue, and will go on with the trial
    cancelled = "cancelled"  # its Slurm job was cancelled by a person
    dead = "dead"


class Watch:
    """Tells whether owners live; it must be kept to judge owners on other hosts, whose silence it times on our own clock.

    `silent` holds the claims that were found dead in this way, to be handed to those who have not watched for so long.
    """

    def __init__(self, silent: frozenset[Path] = frozenset(), silence_seconds: float = SILENCE_SECONDS, queue: Queue | None = None) -> None:
        """`queue` is asked about owners in Slurm jobs; without it only the clock is."""
        self.silent, self.queue = silent, queue
        self._silence = silence_seconds
        self._seen: dict[Path, tuple[float, float]] = {}

    def standing(self, trial_dir: Path, claim: Claim, names: frozenset[str] | None = None) -> Standing:
        """What became of the owner of `claim`, by the folder's listing `names`."""
        names = listing(trial_dir) if names is None else names
        if is_cancelled(trial_dir, names):
            return Standing.cancelled
        if claim.slurm is not None and claim.slurm.cluster == os.environ.get("SLURM_CLUSTER_NAME") and claim.slurm.job == own_job():
            return Standing.alive if self._lives_in_this_job(trial_dir, claim, claim.slurm, names) else Standing.dead
        if claim.slurm is not None and self.queue is not None:
            return self._standing_in_slurm(trial_dir, claim, claim.slurm, self.queue, names)
        return Standing.alive if self._lives(trial_dir, claim, names) else Standing.dead

    def bury(self, trial_dir: Path, claim: Claim) -> None:
        """Take the owner of `claim` for dead from now on: the caller knows that it does not run."""
        self.silent |= {_path(trial_dir, claim.epoch)}

    def _lives_in_this_job(self, trial_dir: Path, claim: Claim, start: SlurmStart, names: frozenset[str]) -> bool:
        """Earlier starts of this very job are over; where it has many slots, one of this start may well live, here or on another node."""
        if start.shared:
            return start.restart == own_restart() and self._lives(trial_dir, claim, names)
        return claim.owner == Process.me() and not _ended(names, claim.epoch)

    def _standing_in_slurm(self, trial_dir: Path, claim: Claim, start: SlurmStart, queue: Queue, names: frozenset[str]) -> Standing:
        ended = bool(_ended(names, claim.epoch))
        state = queue.state(start.job)
        if state == "CANCELLED" and _name(claim.epoch, "resumed") not in names:
            with contextlib.suppress(OSError):
                _path(trial_dir, claim.epoch, "cancelled").touch()  # Slurm forgets it in minutes
            return Standing.cancelled
        if state in ENDED:
            return Standing.dead
        if state == GONE:
            # Absent from one answer, another user's, or long over: a heart that beat lately belongs to a living owner.
            beat = _path(trial_dir, claim.epoch).stat().st_mtime
            return Standing.dead if ended or abs(time.time() - beat) > STALE_SECONDS else Standing.alive
        if not state:  # nothing is known now
            return Standing.requeued if ended else Standing.alive
        current = state in ("RUNNING", "SUSPENDED", "STOPPED") and queue.restarts(start.job) == start.restart
        if current and start.shared:  # it goes on with other slots, and what this one has left is for any slot to take up
            return Standing.alive if self._lives(trial_dir, claim, names) else Standing.dead
        return Standing.alive if current and not ended else Standing.requeued

    def _lives(self, trial_dir: Path, claim: Claim, names: frozenset[str]) -> bool:
        """Whether the owner of `claim` still runs, by the process table here and by its heartbeat elsewhere."""
        if _ended(names, claim.epoch):
            return False
        if claim.owner.host == platform.node() and claim.owner.boot != _boot():
            return False  # this machine has been started anew since
        if claim.owner.is_local:
            return claim.owner.lives()
        path, now = _path(trial_dir, claim.epoch), time.monotonic()
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
    """A won claim; within the block its heartbeat goes on, at the end it is released."""

    def __init__(self, trial_dir: Path, claim: Claim) -> None:
        self.trial_dir, self.claim = trial_dir, claim
        self._ended = threading.Event()
        self._beat = threading.Thread(target=self._keep_beating, daemon=True)

    def _keep_beating(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(_path(self.trial_dir, self.claim.epoch))

    def lost(self) -> bool:
        """Whether somebody took the trial over, or cancelled it."""
        return _path(self.trial_dir, self.claim.epoch + 1).exists() or is_cancelled(self.trial_dir)

    def __enter__(self) -> "Ownership":
        self._beat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):  # else this process's end says the same, later
            _path(self.trial_dir, self.claim.epoch, "crashed" if error else "released").touch()


def claim(trial_dir: Path, epoch: int, driver: str, step: int, slurm: SlurmStart | None = None) -> Ownership | None:
    """Ownership of a trial at `epoch`, one more than its last claim; None where another process won that epoch."""
    (trial_dir / "claim").mkdir(parents=True, exist_ok=True)
    won = Claim(epoch, Process.me(), driver, step, time.time(), slurm)
    return Ownership(trial_dir, won) if create_exclusive(_path(trial_dir, epoch), to_json(asdict(won))) else None


def crashes_in_place(claims: list[Claim], step: int, driver: str, trial_dir: Path) -> int:
    """How many of the last claims died under this very driver without gaining a step over `step`.

    A claim whose driver died too was ended with it, and is no fault of the trial; nor is one that was released.
    """
    crashes, names = 0, listing(trial_dir)
    for past in reversed(claims):
        forgiven = _ended(names, past.epoch) == "released" or _name(past.epoch, "resumed") in names
        if past.step != step or past.driver != driver or forgiven:
            break
        crashes += 1
    return crashes


def starts_in_vain(claims: list[Claim], step: int, trial_dir: Path) -> int:
    """How many of the last claims were Slurm jobs that gained no step over `step`, whatever ended them, since a person last asked."""
    vain, names = 0, listing(trial_dir)
    for past in reversed(claims):
        if past.step != step or past.slurm is None or _name(past.epoch, "resumed") in names:
            break
        vain += 1
    return vain
