"""Files that are whole or not there: written beside, synced, renamed. Or, line by line, never with a torn line before the last."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; a file system that cannot sync folders is left to its own order."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _write_beside(path: Path, data: bytes) -> Path:
    beside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        beside.unlink(missing_ok=True)  # a full disk is not made fuller
        raise
    return beside


def remove_partial(folder: Path) -> None:
    """Remove what killed writers left beside their targets; only the owner of `folder` may call it."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data`: a reader sees the old content or the new, never a part, also after a power cut."""
    beside = _write_beside(path, data.encode() if isinstance(data, str) else data)
    os.replace(beside, path)
    sync_folder(path.parent)


def create_exclusive(path: Path, data: str) -> bool:
    """Create `path` with its whole content unless it exists; False, and nothing changed, where somebody was first."""
    beside = _write_beside(path, data.encode())
    try:
        os.link(beside, path)
    except FileExistsError:
        return False
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file of this project holds; raises ValueError, one line with the file, where it holds none."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} must be one that this project wrote; got {path}: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} must be one that this project wrote; got {path}: a {type(value).__name__} and no object")
    return value


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within the block, what does not fit what the file should hold becomes one ValueError that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        said = f"{type(error).__name__} {' '.join(str(error).split())}"
        raise ValueError(f"{path.name} must be one that this project wrote; got {path}: {said}") from error
    except OSError as error:
        raise ValueError(f"{path.name} must be a file that can be read; got {path}: {error.strerror}") from error


class Lines:
    """Appends lines to a file. What the disk refuses waits in memory and goes with the next line: none is lost, torn or written twice."""

    def __init__(self, path: Path) -> None:
        """`path` must exist, and nobody else write to it."""
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._good = os.fstat(self._descriptor).st_size  # bytes that are whole lines
        self._torn = False
        self._waiting = b""

    def add(self, line: str) -> None:
        """Append `line`, now or as soon as the disk takes it."""
        first = not self._waiting
        self._waiting += line.encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if first:
                log.warning("%s cannot be written: %s; what is recorded waits in memory", self._path, error.strerror)

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
        """Make all lines durable; raises OSError where the disk refuses."""
        self._write()
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file; what is not written is lost."""
        os.close(self._descriptor)


def to_json(value: Any) -> str:
    """JSON text that any parser reads: a number that is not finite is an error here and not a NaN there."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n"
