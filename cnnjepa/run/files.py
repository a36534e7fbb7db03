"""Write files atomically, or line by line so that only the last line can be torn."""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"  # of a packed image set: names its files with bytes and sha256
# Key of the checksum over the other keys. Files of version 0.1 have none.
SEAL = "sha256"
# File of a sweep folder: where the folder is, and how files are created exclusively in it.
PLACE = "place.json"
BY_LINKS, BY_FOLDERS = "links", "folders"
# What os.link and os.symlink raise where the file system, its server or the mount has no such links.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.EXDEV}
_LEVELS = 4  # from trials/<run ID>/claim up to the sweep folder
_RESTORE = "restore it from a copy, or delete it and type the command again"


class DamagedError(ValueError):
    """A file of a run or a sweep that is not as it was written; one line says which and what to do."""

    def __init__(self, path: Path, said: str, rule: str = "be a file that this project wrote", remedy: str = _RESTORE) -> None:
        """Take the file, what is wrong with it, the rule that it breaks, and what to do."""
        self.path, self.said, self.remedy = path, " ".join(said.split()), remedy
        super().__init__(f"{path.name} must {rule}; got {path}: {self.said}: {remedy}")


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable, if the file system can sync folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _name_beside(path: Path) -> Path:
    # Two containers may have the same host name and PID, so these alone do not tell writers apart.
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.{os.urandom(4).hex()}.tmp")


def _write_beside(path: Path, data: bytes) -> Path:
    return _write_new(_name_beside(path), data, path)


def _write_new(beside: Path, data: bytes, path: Path) -> Path:
    """Write the durable file `beside`, which will be `path`; return it. Errors name `path`."""
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)  # free the space on a full disk
        error.filename = error.filename or str(path)  # write and fsync do not name the file
        raise
    return beside


def remove_partial(folder: Path) -> None:
    """Remove temporary files of killed writers; only the owner of `folder` may call this."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data`: readers never see a part of it, even after a power cut."""
    beside = _write_beside(path, data.encode() if isinstance(data, str) else data)
    os.replace(beside, path)
    sync_folder(path.parent)


def has_no_links(error: OSError) -> bool:
    """Return whether `error`, of os.link or os.symlink, says that there are no such links here."""
    return error.errno in _NO_LINKS


def links_work(folder: Path) -> bool:
    """Return whether a file in `folder` can get a second name by a hard link."""
    first = _write_beside(folder / "links", b"")
    second = _name_beside(first)
    try:
        os.link(first, second)
        return first.samefile(second)
    except OSError as error:
        if has_no_links(error):
            return False
        raise
    finally:
        second.unlink(missing_ok=True)
        first.unlink(missing_ok=True)


def way_of(folder: Path) -> str:
    """Return how files are created exclusively in `folder`, as the sweep folder above it records; "" without a record."""
    for above in [folder, *folder.parents][:_LEVELS]:
        path = above / PLACE
        if path.exists():
            with reading(path):
                if (way := read_json(path)["exclusive"]) not in (BY_LINKS, BY_FOLDERS):
                    raise TypeError(f"exclusive must be {BY_LINKS} or {BY_FOLDERS}; got {way}")
                return str(way)
    return ""


def create_exclusive(path: Path, data: str) -> bool:
    """Create `path` with its full content; return False, changing nothing, if it already exists.

    All processes of a sweep folder do it in the same way, which `PLACE` records: two ways at once
    could have two winners. Without a record, use hard links, or `create_by_folder` where there are
    none.
    """
    way = way_of(path.parent)
    if way == BY_FOLDERS:
        return create_by_folder(path, data)
    beside = _write_beside(path, data.encode())
    try:
        os.link(beside, path)
    except FileExistsError:
        if not _are_one(beside, path):  # else a server has done it, and was asked again since its answer was lost
            return False
    except OSError as error:
        if not has_no_links(error):
            raise
        if way:
            raise OSError(
                error.errno, "the sweep's files are created by hard links, which this machine's mount lacks", str(path)
            ) from error
        return create_by_folder(path, data)
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def _are_one(first: Path, second: Path) -> bool:
    try:
        return first.samefile(second)
    except FileNotFoundError:
        return False


def create_by_folder(path: Path, data: str) -> bool:
    """Do what `create_exclusive` does without hard links.

    A folder with one file of a unique name is renamed to `.<name>.taking`. That fails while a
    folder with a file is there, so one process at a time holds the name. The holder moves its file
    to `path`, or removes it if `path` exists. Every other process first moves the holder's file for
    it: a holder that dies does not block them, and the file, which can be moved only once, cannot
    replace another one.
    """
    taking, beside = path.with_name(f".{path.name}.taking"), _name_beside(path)
    mine = taking / beside.name
    beside.mkdir()
    try:
        _write_new(beside / beside.name, data.encode(), path)
        while not _is_listed(path):
            try:
                os.rename(beside, taking)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                _finish(taking, path)
                continue
            return _settle(mine, path)
        return False
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _is_listed(path: Path) -> bool:
    """Return whether `path` exists, from a listing: a client may remember for seconds that a name was missing."""
    return path.name in os.listdir(path.parent)


def _settle(mine: Path, path: Path) -> bool:
    """Give `path` to the file `mine` in the folder that this process holds, unless it exists."""
    won = True
    with contextlib.suppress(FileNotFoundError):  # another process has moved it to `path`
        if _is_listed(path):
            mine.unlink()
            won = False
        else:
            os.rename(mine, path)
    _free(mine.parent)
    if won:
        sync_folder(path.parent)
    return won


def _finish(taking: Path, path: Path) -> None:
    """Move the holder's file to `path` for it, unless `path` exists."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(taking):
            if not _is_listed(path):
                os.rename(taking / name, path)
    _free(taking)


def _free(taking: Path) -> None:
    with contextlib.suppress(OSError):  # another process holds it, or has removed it
        taking.rmdir()


def link_or_copy(source: Path, target: Path) -> None:
    """Give the content of `source` the name `target` too: by a hard link, or a durable copy where there are none.

    Raise FileExistsError if a link finds `target` there; a copy replaces it.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if not has_no_links(error):
            raise
        beside = _name_beside(target)
        try:
            shutil.copy2(source, beside)
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, without its seal; raise DamagedError if it has none."""
    try:
        value = json.loads(path.read_bytes(), parse_constant=_refuse_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, str(error)) from error
    if not isinstance(value, dict):
        raise DamagedError(path, f"a {type(value).__name__}, not an object")
    seal = value.pop(SEAL, None)
    if seal is not None and seal != _seal(value):
        raise DamagedError(path, f"its content does not match its checksum {str(seal)[:16]}")
    return value


def tail(path: Path, most: int) -> bytes:
    """Return the last `most` bytes of a file, or all of a shorter one."""
    with open(path, "rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - most, 0))
        return file.read()


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is not a finite number")


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _refuse_number(text)


def _seal(values: Mapping[str, Any]) -> str:
    """Return 16 hex digits that change with any value or key."""
    as_read = json.loads(json.dumps(values))  # its keys are text, and sorted as text
    return hashlib.sha256(json.dumps(as_read, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def sealed_json(values: Mapping[str, Any]) -> str:
    """Return `to_json` of an object with a checksum, which `read_json` verifies and removes."""
    return to_json({**values, SEAL: _seal(values)})


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors in the block about the file or its content into a DamagedError that names it."""
    try:
        yield
    except DamagedError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        said = str(error) if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__} {error}"
        raise DamagedError(path, said) from error
    except OSError as error:
        rule, remedy = "be a file that can be read", "make it a file that you can read"
        raise DamagedError(path, str(error.strerror), rule, remedy) from error


class Lines:
    """A file of lines, none lost, torn or doubled: what the disk refuses waits in memory."""

    def __init__(self, path: Path) -> None:
        """Open `path`, which must exist and have no other writer."""
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._good = os.fstat(self._descriptor).st_size  # bytes that are whole lines
        self._torn = False
        self._waiting = b""

    def add(self, line: str) -> None:
        """Append `line`, now or as soon as the disk accepts it."""
        first = not self._waiting
        self._waiting += line.encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if first:
                log.warning("%s cannot be written: %s; records wait in memory", self._path, error.strerror)

    def _write(self) -> None:
        if self._torn:
            os.ftruncate(self._descriptor, self._good)
            self._torn = False
        written = 0
        try:
            while written < len(self._waiting):
                written += os.write(self._descriptor, self._waiting[written:])
        except OSError:
            self._torn = written > 0
            raise
        self._good += written
        self._waiting = b""

    def sync(self) -> None:
        """Make all lines durable; raise OSError if the disk refuses."""
        self._write()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; lines that are not yet written are lost."""
        os.close(self._descriptor)


def to_json(value: Any) -> str:
    """Return JSON text that any parser reads; numbers that are not finite raise an error."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
