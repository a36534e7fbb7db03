"""Copy a packed set to a node's own disk: once per node, verified, and kept for later jobs.

    <local_scratch>/cnnjepa-<uid>/   mode 0700
        <key>/                       complete copy; the key is the checksum of the set's manifest
        <key>.partial/               unfinished copy; a file in it that is not *.tmp is verified
        <key>.lock                   exclusive while copying or freeing, shared while a run reads

The kernel frees the lock (flock) of a dead process, and the next process continues the copy.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import shlex
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cnnjepa.run.files import MANIFEST, sync_folder, write_atomic

_CHUNK_BYTES = 16 * 2**20  # a run can be stopped between two chunks
_SAY_SECONDS = 5.0
_LOOK_SECONDS = 0.2
_DAMAGED_SECONDS = 10.0  # a damaged copy in use cannot be repaired; for this long, it may be another process taking the lock
_KEEP_FREE_SHARE, _KEEP_FREE_BYTES = 0.05, 10 * 10**9  # left free on the disk: the smaller of the two


class StagingError(RuntimeError):
    """Raised when a set cannot be copied to this node; it can still be read in place."""


@dataclass(frozen=True)
class StagedFile:
    """A file of a packed set; `path` is relative to the set's folder."""

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
        """Return the set in `folder`, None without a manifest; raise StagingError at a bad one."""
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
        """Return the name of the copy, 16 hex digits."""
        return hashlib.sha256(self.manifest).hexdigest()[:16]

    @property
    def bytes(self) -> int:
        """Return the size of all files."""
        return sum(f.bytes for f in self.files)

    def missing_in(self, folder: Path) -> list[StagedFile]:
        """Return the files that `folder` lacks or holds in another size."""
        return [f for f in self.files if _size(folder / f.path) != f.bytes]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def own_folder(local_scratch: str) -> Path:
    """Return this user's folder on this node; raise StagingError or OSError if not private."""
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
    found = folder.lstat()  # not stat: another user may have planted a link
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise StagingError(f"{folder} must be this user's own folder of mode 0700; got {stat.filemode(found.st_mode)} of {found.st_uid}")
    return folder


def kept_free(total_bytes: int) -> int:
    """Return the bytes of a node's disk that staging leaves free."""
    return min(int(total_bytes * _KEEP_FREE_SHARE), _KEEP_FREE_BYTES)


def shortage(need_bytes: int, folder: Path) -> str:
    """Return why `need_bytes` more do not fit into `folder`, or "" if they do."""
    disk = shutil.disk_usage(folder)
    keep = kept_free(disk.total)
    if need_bytes + keep <= disk.free:
        return ""
    return (
        f"{need_bytes / 1e9:.1f} GB do not fit into the {disk.free / 1e9:.1f} GB free in {folder}, of which {keep / 1e9:.1f} GB stay free"
    )


def obstacle(packed: PackedSet, local_scratch: str) -> str:
    """Return why the set cannot be staged on this machine, or "" if it can be or is."""
    try:
        here = own_folder(local_scratch)
        missing = min((packed.missing_in(here / f"{packed.key}{end}") for end in ("", ".partial")), key=len)
        return shortage(sum(f.bytes for f in missing), here) if missing else ""
    except (StagingError, OSError) as error:
        return " ".join(str(error).split())


def try_lock(path: Path, how: int) -> int | None:
    """Return an open file that holds the lock until it is closed, or None if the lock is taken."""
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
    """Stage a set: call `advance` until it returns True, then read `root` within the block.

    One process per node copies; the others wait. On failure, `cause` says why; `root` is the set.
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

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        if self._copying is not None:
            self._copying.close()  # type: ignore[attr-defined]  # a generator
            self._copying = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def give_up(self, cause: str) -> None:
        """Read the set in place."""
        self._release()
        self.root, self.cause, self.done = self.packed.folder, cause, True

    def advance(self, seconds: float = 1.0) -> bool:
        """Copy, or wait for a copying process, for about `seconds`; return whether it is done."""
        until = time.monotonic() + seconds
        while not self.done:
            try:
                busy = self._step()
            except (StagingError, OSError) as error:
                self.give_up(" ".join(str(error).split()))
            if time.monotonic() >= until:
                break
            if not self.done and not busy:
                time.sleep(_LOOK_SECONDS * random.uniform(0.5, 1.5))
        return self.done

    def _step(self) -> bool:
        """Look once or copy one chunk; return False if there is nothing to do but wait."""
        if self._copying is not None:
            if next(self._copying, self) is self:
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
        if self._lock is not None and self._is_whole(folder):  # another process was faster
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
        """Wait for a copying process; raise StagingError if the copy is damaged but in use."""
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
        """Copy and verify missing files. A stop keeps the verified ones, an error none."""
        packed, partial = self.packed, here / f"{folder.name}.partial"
        if folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            folder.rename(partial)  # only damaged files are copied again
        partial.mkdir(exist_ok=True)
        for stray in partial.rglob("*.tmp"):
            stray.unlink()
        missing = packed.missing_in(partial)
        for file in missing:
            (partial / file.path).unlink(missing_ok=True)
        need = sum(f.bytes for f in missing)
        try:
            if cause := shortage(need, partial):
                raise StagingError(f"{cause}; `python -m jobs.stage --list {shlex.quote(self._scratch)}` shows what is there")
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
    """Progress of a copy, printed to the job's log."""

    def __init__(self, packed: PackedSet, need: int) -> None:
        self._need, self._copied = need, 0
        self._started = self._said = time.monotonic()
        print(f"staging: copying {need / 1e9:.2f} of {packed.bytes / 1e9:.2f} GB of {packed.folder} to this node", flush=True)

    @property
    def _rate(self) -> float:
        return self._copied / 1e6 / max(time.monotonic() - self._started, 1e-9)

    def add(self, count: int) -> None:
        """Count `count` bytes more."""
        self._copied += count
        if time.monotonic() - self._said > _SAY_SECONDS:
            self._said = time.monotonic()
            print(f"staging: {self._copied / 1e9:.2f} of {self._need / 1e9:.2f} GB, {self._rate:.0f} MB/s", flush=True)

    def end(self, folder: Path) -> None:
        """Print the totals."""
        seconds = time.monotonic() - self._started
        print(f"staging: {self._copied} bytes copied to {folder} in {seconds:.1f} s, {self._rate:.0f} MB/s with checksums", flush=True)
