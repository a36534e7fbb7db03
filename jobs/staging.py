"""A packed set's copy on a node's own disk: made once by whoever comes first, checked, kept for the next job, freed when asked.

    <local_scratch>/cnnjepa-<uid>/   0700, this user's alone
        <key>/                       a whole copy; the key is the checksum of the set's manifest, so that no two sets mix
        <key>.partial/               a copy on its way; a file has its name when its checksum was right
        <key>.lock                   held exclusively while the set is copied or freed, shared while a run reads it

Locks are the kernel's (flock): that of a process that died is free at once, and the next one goes on with what it left.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType

from cnnjepa.run.files import MANIFEST, sync_folder, write_atomic

_CHUNK_BYTES = 16 * 2**20  # between two of them a run may be stopped
_SAY_SECONDS = 5.0
_LOOK_SECONDS = 0.2
_DAMAGED_SECONDS = (
    10.0  # a damaged copy that a run reads cannot be repaired; so long it may be no more than a lock that another process takes
)
_KEEP_FREE_SHARE, _KEEP_FREE_BYTES = 0.05, 10 * 10**9  # of the node's disk, the smaller of the two, for others


class StagingError(Exception):
    """The set cannot be brought to this node; it can be read where it is."""


@dataclass(frozen=True)
class StagedFile:
    """A file of a packed set, by its path in the set's folder."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PackedSet:
    """A folder with a manifest that names its files."""

    folder: Path
    manifest: bytes
    files: tuple[StagedFile, ...]

    @staticmethod
    def of(folder: Path) -> "PackedSet | None":
        """The set in `folder`, None where it holds none, such as loose images. Raises StagingError for a manifest that cannot be read."""
        try:
            manifest = (folder / MANIFEST).read_bytes()
        except OSError:
            return None
        try:
            files = tuple(StagedFile(str(f["name"]), int(f["bytes"]), str(f["sha256"])) for f in json.loads(manifest)["files"])
        except (ValueError, TypeError, KeyError) as error:
            raise StagingError(f"{folder / MANIFEST} must name its files with bytes and sha256; got {error!r}") from error
        for file in files:
            path = PurePosixPath(file.path)
            if path.is_absolute() or ".." in path.parts or not path.parts or file.path == MANIFEST:
                raise StagingError(f"{folder / MANIFEST} must name files within its folder; got {file.path}")
        return PackedSet(folder, manifest, files)

    @property
    def key(self) -> str:
        """What the copy is called."""
        return hashlib.sha256(self.manifest).hexdigest()[:16]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(f.bytes for f in self.files)

    def missing_in(self, folder: Path) -> list[StagedFile]:
        """The files that are not in `folder` in their size."""
        return [f for f in self.files if _size(folder / f.path) != f.bytes]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def own_folder(local_scratch: str) -> Path:
    """This user's folder on this node, created where it is missing. Raises StagingError or OSError where it would not be private."""
    parent = Path(os.path.expandvars(local_scratch))
    if not parent.is_absolute():
        raise StagingError(f"cluster.local_scratch must be an absolute path on the node; got {parent}")
    mode = parent.stat().st_mode
    if mode & 0o022 and not mode & stat.S_ISVTX:
        raise StagingError(
            f"cluster.local_scratch must have the sticky bit where others may write; got {parent} with {stat.filemode(mode)}"
        )
    folder = parent / f"cnnjepa-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()  # not stat: a link is another's trick
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise StagingError(f"{folder} must be this user's own folder of mode 0700; got {stat.filemode(found.st_mode)} of {found.st_uid}")
    return folder


def kept_free(total_bytes: int) -> int:
    """Bytes of a node's disk that staging leaves to others."""
    return min(int(total_bytes * _KEEP_FREE_SHARE), _KEEP_FREE_BYTES)


def shortage(need_bytes: int, folder: Path) -> str:
    """Why so much more does not fit into `folder`, '' where it does."""
    disk = shutil.disk_usage(folder)
    keep = kept_free(disk.total)
    if need_bytes + keep <= disk.free:
        return ""
    return (
        f"{need_bytes / 1e9:.1f} GB do not fit into the {disk.free / 1e9:.1f} GB free in {folder}, of which {keep / 1e9:.1f} GB stay free"
    )


def obstacle(packed: PackedSet, local_scratch: str) -> str:
    """Why the set could not be staged on this machine, '' where it could or is."""
    try:
        here = own_folder(local_scratch)
        missing = min((packed.missing_in(here / f"{packed.key}{end}") for end in ("", ".partial")), key=len)
        return shortage(sum(f.bytes for f in missing), here) if missing else ""
    except (StagingError, OSError) as error:
        return " ".join(str(error).split())


def try_lock(path: Path, how: int) -> int | None:
    """An open file that holds the lock `how` until it is closed; None where another's lock is in the way."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError):
            return None
        raise  # a file system without locks
    return file


class Staging:
    """One process's part in bringing a set to its node: `advance` until it is True, then read from `root` within the block.

    Of all processes of a node one copies and the others wait for it. Where it cannot be, `cause` says why and `root` is the set itself.
    """

    def __init__(self, packed: PackedSet, local_scratch: str) -> None:
        self.packed, self.root, self.cause, self.done = packed, packed.folder, "", False
        self._scratch = local_scratch
        self._lock: int | None = None
        self._copying: Iterator[None] | None = None
        self._damaged_since: float | None = None
        self._waiting = False

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._release()

    def _release(self) -> None:
        if self._copying is not None:
            self._copying.close()  # type: ignore[attr-defined]  # a generator
            self._copying = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def give_up(self, cause: str) -> None:
        """Read the set where it is."""
        self._release()
        self.root, self.cause, self.done = self.packed.folder, cause, True

    def advance(self, seconds: float = 1.0) -> bool:
        """Copy, or wait for who does, for about so long; whether `root` is settled."""
        until = time.monotonic() + seconds
        while not self.done:
            try:
                busy = self._step()
            except StagingError as error:
                self.give_up(str(error))
            except OSError as error:
                self.give_up(" ".join(str(error).split()))
            if time.monotonic() >= until:
                break
            if not self.done and not busy:
                time.sleep(_LOOK_SECONDS * random.uniform(0.5, 1.5))
        return self.done

    def _step(self) -> bool:
        """One look or one chunk; False where there is nothing to do but to wait."""
        if self._copying is not None:
            if next(self._copying, self) is self:
                self._copying = None
                self._release()
            return True
        here = own_folder(self._scratch)
        folder, lock = here / self.packed.key, here / f"{self.packed.key}.lock"
        if self._is_whole(folder):
            self._lock = try_lock(lock, fcntl.LOCK_SH)
            if self._lock is not None and self._is_whole(folder):  # it may have been freed meanwhile
                self.root, self.done = folder, True
            elif self._lock is not None:
                self._release()
            return False
        self._lock = try_lock(lock, fcntl.LOCK_EX)
        if self._lock is not None and self._is_whole(folder):  # another was faster, between the look and the lock
            self._release()
            return True
        if self._lock is not None:
            self._copying = self._copy(here, folder)
            return True
        self._wait(folder, lock)
        return False

    def _is_whole(self, folder: Path) -> bool:
        return _size(folder / MANIFEST) == len(self.packed.manifest) and not self.packed.missing_in(folder)

    def _wait(self, folder: Path, lock: Path) -> None:
        """Another process copies; or it reads a copy that has been damaged since, which cannot be repaired under it."""
        reader = try_lock(lock, fcntl.LOCK_SH)
        if reader is None:
            self._damaged_since = None
            if not self._waiting:
                print(f"staging: waiting for the process that copies {self.packed.folder} to this node", flush=True)
            self._waiting = True
            return
        os.close(reader)
        self._damaged_since = self._damaged_since or time.monotonic()
        if time.monotonic() - self._damaged_since > _DAMAGED_SECONDS:
            raise StagingError(f"{folder} is damaged, and another run is reading it")

    def _copy(self, here: Path, folder: Path) -> Iterator[None]:
        """Copy what is missing, checked, and give the whole its name; what fails leaves nothing, what is stopped leaves checked files."""
        packed, partial = self.packed, here / f"{folder.name}.partial"
        if folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            folder.rename(partial)  # what is damaged is copied again
        partial.mkdir(exist_ok=True)
        for stray in partial.rglob("*.tmp"):
            stray.unlink()
        missing = packed.missing_in(partial)
        for file in missing:
            (partial / file.path).unlink(missing_ok=True)
        need = sum(f.bytes for f in missing)
        try:
            if cause := shortage(need, partial):
                raise StagingError(f"{cause}; `python -m jobs.stage --list {self._scratch}` shows what is there")
            pace = _Pace(packed, need)
            for file in missing:
                yield from self._copy_file(file, partial, pace)
            write_atomic(partial / MANIFEST, packed.manifest)
            for inner in {(partial / f.path).parent for f in packed.files}:
                sync_folder(inner)
            partial.rename(folder)
            sync_folder(here)
            pace.end(folder)
        except (OSError, StagingError):
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _copy_file(self, file: StagedFile, partial: Path, pace: "_Pace") -> Iterator[None]:
        source, target = self.packed.folder / file.path, partial / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(target.name + ".tmp")
        try:
            with open(source, "rb") as read, open(beside, "wb") as write:
                while count := os.sendfile(write.fileno(), read.fileno(), None, _CHUNK_BYTES):
                    pace.add(count)
                    yield
                os.fsync(write.fileno())
            if _size(beside) != file.bytes:
                raise StagingError(f"{source} must have the {file.bytes} bytes of its manifest; got {_size(beside)}")
            checksum, buffer = hashlib.sha256(), bytearray(_CHUNK_BYTES)
            with open(beside, "rb", buffering=0) as copied:
                while count := copied.readinto(buffer):
                    checksum.update(memoryview(buffer)[:count])
                    yield
            if checksum.hexdigest() != file.sha256:
                raise StagingError(f"the copy of {source} must have the sha256 {file.sha256}; got {checksum.hexdigest()}")
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


class _Pace:
    """Says how far a copy is, in the job's log."""

    def __init__(self, packed: PackedSet, need: int) -> None:
        self._packed, self._need, self._copied = packed, need, 0
        self._started = self._said = time.monotonic()
        print(f"staging: copying {need / 1e9:.2f} of {packed.bytes / 1e9:.2f} GB of {packed.folder} to this node", flush=True)

    @property
    def _rate(self) -> float:
        return self._copied / 1e6 / max(time.monotonic() - self._started, 1e-9)

    def add(self, count: int) -> None:
        """So many bytes more."""
        self._copied += count
        if time.monotonic() - self._said > _SAY_SECONDS:
            self._said = time.monotonic()
            print(f"staging: {self._copied / 1e9:.2f} of {self._need / 1e9:.2f} GB, {self._rate:.0f} MB/s", flush=True)

    def end(self, folder: Path) -> None:
        """All is there."""
        seconds = time.monotonic() - self._started
        print(f"staging: {self._copied} bytes copied to {folder} in {seconds:.1f} s, {self._rate:.0f} MB/s with checksums", flush=True)
