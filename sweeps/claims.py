"""Who owns a trial: claims that exactly one process wins, on a local disk and on NFS or Lustre alike.

`trials/<signature>/claim/<epoch>.json` is created whole and exclusively; the highest epoch owns the trial. An owner touches its file
every HEARTBEAT_SECONDS. Whoever finds the owner dead creates the next epoch; of two who try, one fails.
"""

import contextlib
import json
import os
import platform
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil

from cnnjepa.files import create_exclusive, to_json

HEARTBEAT_SECONDS = 20.0
# An owner on another host is taken for dead only if its heartbeat stood still for so long on our own clock.
SILENCE_SECONDS = 600.0


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
class Claim:
    """One epoch of ownership: who trains, for which driver, and the step from which it started."""

    epoch: int
    owner: Process
    driver: Process
    step: int


def history(trial_dir: Path) -> list[Claim]:
    """All claims of a trial, oldest first."""
    claims = []
    for path in sorted((trial_dir / "claim").glob("[0-9]*.json")):
        values = json.loads(path.read_text())
        claims.append(Claim(values["epoch"], Process(**values["owner"]), Process(**values["driver"]), values["step"]))
    return claims


def _ended(trial_dir: Path, epoch: int) -> str:
    """'released' or 'crashed' where the owner has said so, else ''."""
    return next((way for way in ("released", "crashed") if _path(trial_dir, epoch, way).exists()), "")


def _path(trial_dir: Path, epoch: int, what: str = "json") -> Path:
    return trial_dir / "claim" / f"{epoch:06d}.{what}"


class Watch:
    """Tells whether owners live; it must be kept to judge owners on other hosts, whose silence it times on our own clock.

    `silent` holds the claims that were found dead in this way, to be handed to those who have not watched for so long.
    """

    def __init__(self, silent: frozenset[Path] = frozenset(), silence_seconds: float = SILENCE_SECONDS) -> None:
        self.silent = silent
        self._silence = silence_seconds
        self._seen: dict[Path, tuple[float, float]] = {}

    def lives(self, trial_dir: Path, claim: Claim) -> bool:
        """Whether the owner of `claim` still runs; a released claim does not."""
        if _ended(trial_dir, claim.epoch):
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
        """Whether somebody took the trial over."""
        return _path(self.trial_dir, self.claim.epoch + 1).exists()

    def __enter__(self) -> "Ownership":
        self._beat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        _path(self.trial_dir, self.claim.epoch, "crashed" if error else "released").touch()


def claim(trial_dir: Path, epoch: int, driver: Process, step: int) -> Ownership | None:
    """Ownership of a trial at `epoch`, one more than its last claim; None where another process won that epoch."""
    (trial_dir / "claim").mkdir(parents=True, exist_ok=True)
    won = Claim(epoch, Process.me(), driver, step)
    text = to_json({"epoch": epoch, "owner": asdict(won.owner), "driver": asdict(driver), "step": step})
    return Ownership(trial_dir, won) if create_exclusive(_path(trial_dir, epoch), text) else None


def crashes_in_place(claims: list[Claim], step: int, driver: Process, trial_dir: Path) -> int:
    """How many of the last claims died under this very driver without gaining a step over `step`.

    A claim whose driver died too was ended with it, and is no fault of the trial; nor is one that was released.
    """
    crashes = 0
    for past in reversed(claims):
        if past.step != step or past.driver != driver or _ended(trial_dir, past.epoch) == "released":
            break
        crashes += 1
    return crashes
