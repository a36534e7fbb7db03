"""Save and find checkpoints that are complete and verified.

A file is named `step-<step>-<attempt>-<sha256 of its bytes, 16 digits>.pt`, without an attempt if the
run has no claims: one atomic rename publishes bytes and checksum, and a plain `torch.load` can read
it. An attempt that has lost its trial deletes nothing. Finding files does not import torch.
"""

import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cnnjepa.run.attempts import last_step, lost
from cnnjepa.run.files import link_or_copy, sync_folder

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{9})-(?:(\d{6})-)?([0-9a-f]{16})\.pt")
_PARTIAL = re.compile(r"\.step-\d{9}-(\d{6})\..*\.tmp")


@dataclass(frozen=True)
class Checkpoint:
    """A published file, with the step, the attempt and the checksum in its name."""

    path: Path
    step: int  # optimiser steps done
    digest: str
    attempt: int = 0  # 0 if the run has no claims


def named(folder: Path, step: int, attempt: int, digest: str) -> Checkpoint:
    """Return the checkpoint that these name, whether it is there or not."""
    by = f"-{attempt:06d}" if attempt else ""
    return Checkpoint(folder / f"step-{step:09d}{by}-{digest}.pt", step, digest, attempt)


def find(folder: Path, attempt: int = 0) -> list[Checkpoint]:
    """Return the checkpoints in `folder`, best first, unopened; [] if there is no folder.

    The newest attempt's come first, and each attempt's by step. What an attempt saved after it had
    lost the trial comes last: it is read only if nothing else is left. With `attempt`, those of
    later attempts are left out.
    """
    found = []
    for path in folder.glob("step-*.pt") if folder.is_dir() else []:
        if (match := _NAME.fullmatch(path.name)) and (not attempt or int(match[2] or 0) <= attempt):
            found.append(Checkpoint(path, int(match[1]), match[3], int(match[2] or 0)))
    limits = {number: last_step(folder.parent, number) for number in {c.attempt for c in found}}
    return sorted(found, key=lambda c: (c.step <= limits[c.attempt], c.attempt, c.step), reverse=True)


def remove_partial(folder: Path, attempt: int) -> None:
    """Remove temporary files of killed writers, but none of a later attempt."""
    for path in folder.glob(".*.tmp"):
        of = _PARTIAL.fullmatch(path.name)
        if of is None or int(of[1]) <= attempt:
            path.unlink(missing_ok=True)


class _Digesting:
    """File wrapper that computes the checksum of everything that `torch.save` writes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.whole = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.whole.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _digest_of_file(path: Path) -> str:
    """Return the checksum of the file on disk; drop its cached pages first, if possible."""
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def nbytes(state: Any) -> int:
    """Return the bytes that `state` takes on disk, without names and indices."""
    if isinstance(state, dict):
        return sum(map(nbytes, state.values()))
    return getattr(state, "nbytes", 0)


def require_room(folder: Path, size: int) -> None:
    """Raise OSError (ENOSPC) if the file system of `folder` has no room for `size` more bytes."""
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if free < size:
        said = f"{os.strerror(errno.ENOSPC)}: {size / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        raise OSError(errno.ENOSPC, said, str(folder))


def save(folder: Path, step: int, state: dict[str, Any], keep: int, attempt: int = 0) -> Checkpoint:
    """Publish `state` atomically, read it back, then remove all but the `keep` newest intact files.

    Nothing is removed if a later attempt has been claimed. Raise OSError if the disk refuses the
    write or returns other bytes; nothing has changed then.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    require_room(folder, nbytes(state))
    beside = folder / f".step-{step:09d}-{attempt:06d}.{os.uname().nodename}.{os.getpid()}.tmp"
    try:
        with open(beside, "wb") as file:
            through = _Digesting(file)
            torch.save(state, through)  # type: ignore[arg-type]  # needs only write and flush
            file.flush()
            os.fsync(file.fileno())
        digest = through.whole.hexdigest()[:16]
        if _digest_of_file(beside) != digest:
            raise OSError(errno.EIO, "the disk returned other bytes than were written", str(beside))
        saved = named(folder, step, attempt, digest)
        os.replace(beside, saved.path)
    except OSError:
        beside.unlink(missing_ok=True)  # free the space on a full disk
        raise
    except RuntimeError as error:  # torch wraps errors of the file in a RuntimeError
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
    """Remove all older than the `keep` newest intact checkpoints, which include `saved`.

    Those of earlier attempts are older. An attempt that has lost the trial removes none, not even
    its own: the next owner may be about to continue from them.
    """
    if lost(folder.parent, saved.attempt):
        return
    found = find(folder, saved.attempt) if saved.attempt else [c for c in find(folder) if not c.attempt]
    intact = 0
    for position, checkpoint in enumerate(found):
        if len(found) - position <= keep - intact:
            return  # none can be spared
        if intact >= keep:
            checkpoint.path.unlink(missing_ok=True)
        elif checkpoint == saved or checkpoint in _read_back or _is_intact(checkpoint):
            _read_back.add(checkpoint)  # read each only once
            intact += 1


def _is_intact(checkpoint: Checkpoint) -> bool:
    """Return whether the file exists with the bytes that were published."""
    try:
        return _digest_of_file(checkpoint.path) == checkpoint.digest
    except OSError:
        return False


def read(checkpoint: Checkpoint, device: "torch.device", pickled: bool = False) -> dict[str, Any]:
    """Return the saved state; raise ValueError if the bytes are not those that were published.

    With `pickled` it may hold any Python object, and code in it runs. Without, it holds tensors,
    NumPy arrays and plain values; anything else raises pickle.UnpicklingError.
    """
    import torch

    data = checkpoint.path.read_bytes()
    if hashlib.sha256(data).hexdigest()[:16] != checkpoint.digest:
        raise ValueError(f"{checkpoint.path.name}: {len(data)} bytes do not match the checksum in the name")
    with torch.serialization.safe_globals(_arrays()):
        state: dict[str, Any] = torch.load(io.BytesIO(data), map_location=device, weights_only=not pickled)
    return state


@functools.cache
def _arrays() -> list[Any]:
    """Return what NumPy's arrays and numbers are made of, none of which runs code when it is read."""
    import numpy as np

    array, number = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OV"}
    return [np.ndarray, np.dtype, array, number, *kinds]


def peek(checkpoint: Checkpoint, key: str) -> Any:
    """Return one value of an intact checkpoint, None if it has none; tensors are not read from the disk."""
    import torch

    return torch.load(checkpoint.path, map_location="cpu", weights_only=True, mmap=True).get(key)


def intact(folder: Path, attempt: int = 0, set_aside: bool = False) -> Iterator[Checkpoint]:
    """Yield the intact checkpoints as `find` orders them; `set_aside` renames damaged ones *.damaged."""
    found = find(folder, attempt)
    for position, checkpoint in enumerate(found, start=1):
        if _is_intact(checkpoint):
            yield checkpoint
            continue
        instead = "there is none before it: starting from the beginning" if position == len(found) else "using the one before it"
        log.warning("checkpoint %s is damaged (checksum differs): %s", checkpoint.path, instead)
        if set_aside:
            checkpoint.path.rename(checkpoint.path.with_suffix(".damaged"))


def newest_good(folder: Path, set_aside: bool = False) -> Checkpoint | None:
    """Return the newest intact checkpoint or None; `set_aside` renames damaged ones *.damaged."""
    return next(intact(folder, set_aside=set_aside), None)


def adopt(checkpoint: Checkpoint, attempt: int) -> Checkpoint:
    """Return the checkpoint under the name of `attempt`: a link or a copy, which no other attempt removes."""
    if checkpoint.attempt == attempt:
        return checkpoint
    ours = named(checkpoint.path.parent, checkpoint.step, attempt, checkpoint.digest)
    with contextlib.suppress(FileExistsError):
        link_or_copy(checkpoint.path, ours.path)
    sync_folder(ours.path.parent)
    return ours
