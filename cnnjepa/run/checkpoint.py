"""Checkpoints that are whole, verified and few.

A file is `step-<step>-<sha256 of its bytes, 16 digits>.pt`: the name is the checksum, so that one atomic rename publishes both, and a
plain `torch.load(path, weights_only=True)` still reads it. Finding files needs no torch: who only watches runs does not pay for it.
"""

import errno
import hashlib
import io
import itertools
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cnnjepa.run.files import sync_folder

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{9})-([0-9a-f]{16})\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """A published file and what its name promises."""

    path: Path
    step: int  # optimiser steps done
    digest: str


def find(folder: Path) -> list[Checkpoint]:
    """The published checkpoints of `folder`, newest first, none of them opened; [] where there is no folder."""
    found = []
    for path in folder.glob("step-*.pt") if folder.is_dir() else []:
        if match := _NAME.fullmatch(path.name):
            found.append(Checkpoint(path, int(match[1]), match[2]))
    return sorted(found, key=lambda c: c.step, reverse=True)


class _Digesting:
    """A file to `torch.save` that knows the checksum of what it was given."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.whole = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.whole.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _digest_of_file(path: Path) -> str:
    """As the disk holds it: of a file that was synced, what the system keeps in memory is let go first."""
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def nbytes(state: Any) -> int:
    """What `state` takes on disk, in bytes, but for names and indices."""
    if isinstance(state, dict):
        return sum(map(nbytes, state.values()))
    return getattr(state, "nbytes", 0)


def require_room(folder: Path, size: int) -> None:
    """Raise OSError (ENOSPC) where the file system of `folder` has no room for `size` bytes more."""
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if free < size:
        said = f"{os.strerror(errno.ENOSPC)}: {size / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, said, str(folder))


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Checkpoint:
    """Publish `state`, whole or not at all, and read it back; only then remove all but the `keep` newest intact files.

    Raises OSError where the disk refuses it, or gives back other bytes; nothing is left of it then, and nothing else is removed.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    require_room(folder, nbytes(state))
    beside = folder / f".step-{step:09d}.{os.uname().nodename}.{os.getpid()}.tmp"
    try:
        with open(beside, "wb") as file:
            through = _Digesting(file)
            torch.save(state, through)  # type: ignore[arg-type]  # it asks for no more than these two methods
            file.flush()
            os.fsync(file.fileno())
        digest = through.whole.hexdigest()[:16]
        if _digest_of_file(beside) != digest:
            raise OSError(errno.EIO, "the disk gave back other bytes than it was given", str(beside))
        saved = Checkpoint(folder / f"step-{step:09d}-{digest}.pt", step, digest)
        os.replace(beside, saved.path)
    except OSError:
        beside.unlink(missing_ok=True)  # a full disk is not made fuller
        raise
    except RuntimeError as error:  # what torch makes of an error while it writes
        beside.unlink(missing_ok=True)
        cause = error.__context__
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error from None
    sync_folder(folder)
    _prune(folder, saved, keep)
    return saved


_read_back: set[Checkpoint] = set()


def _prune(folder: Path, saved: Checkpoint, keep: int) -> None:
    """Remove what is older than the `keep` newest intact checkpoints, of which `saved` is one."""
    found = find(folder)
    intact = 0
    for position, checkpoint in enumerate(found):
        if len(found) - position <= keep - intact:
            return  # there is none to spare
        if intact >= keep:
            checkpoint.path.unlink(missing_ok=True)
        elif checkpoint == saved or checkpoint in _read_back or _is_intact(checkpoint):
            _read_back.add(checkpoint)  # each is read once
            intact += 1


def _is_intact(checkpoint: Checkpoint) -> bool:
    """Whether its bytes are there and are those that were published."""
    try:
        return _digest_of_file(checkpoint.path) == checkpoint.digest
    except OSError:
        return False


def read(checkpoint: Checkpoint, device: "torch.device") -> dict[str, Any]:
    """The saved state; raises ValueError where the bytes are not those that were published."""
    import torch

    data = checkpoint.path.read_bytes()
    if hashlib.sha256(data).hexdigest()[:16] != checkpoint.digest:
        raise ValueError(f"{checkpoint.path.name}: {len(data)} bytes do not have the checksum of the name")
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    return state


def newest_good(folder: Path, set_aside: bool = False) -> Checkpoint | None:
    """The newest checkpoint whose bytes are intact; a damaged one is reported, with `set_aside` renamed to `*.damaged`, and passed over."""
    found = find(folder)
    for checkpoint, before in itertools.zip_longest(found, found[1:]):
        if _is_intact(checkpoint):
            return checkpoint
        instead = "there is none before it: starting from the beginning" if before is None else "using the one before it"
        log.warning("checkpoint %s is damaged (checksum differs): %s", checkpoint.path, instead)
        if set_aside:
            checkpoint.path.rename(checkpoint.path.with_suffix(".damaged"))
    return None
