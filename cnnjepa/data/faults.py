"""Tell apart what stops the loading of images: a damaged image, a full /dev/shm, a disk that may answer again."""

import errno
import re
import shutil
from contextlib import suppress
from typing import TypeGuard

from PIL import UnidentifiedImageError

from cnnjepa.run.folder import HopelessError, line_of
from cnnjepa.run.ranks import Ranks, gathered

SHARED_MEMORY = "/dev/shm"  # noqa: S108, where torch hands over the batches of loader processes
# Said about the file itself. Any other error of the system, such as EIO, ESTALE or ETIMEDOUT, may pass.
_OF_THE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
REPAIR = "repair or remove it, then run again"
OR_SKIP = f"{REPAIR}, or let data.on_bad_image=skip leave it out"
_NO_SPACE = re.compile(r"</?torch_\S*>: No space left on device")


class DamagedImagesError(HopelessError):
    """Raised when an image that a run reads cannot be decoded; it would be as damaged after a retry."""


class SharedMemoryError(HopelessError):
    """Raised when loader processes have no room in /dev/shm; a retry would fill it again."""


class LoadingError(RuntimeError):
    """Raised on every rank for an error that one met while it loaded images, and a retry may not meet."""


def raise_alike(error: Exception | None, ranks: Ranks) -> None:
    """Raise on every rank the error that any has, a HopelessError before any other; return if none has one.

    Call this on all ranks. Each then ends by the cause itself, and none because another has ended.
    """
    if ranks.count == 1 and error is not None:
        raise error
    mine = error if error is None or isinstance(error, HopelessError) else LoadingError(line_of(error))
    if found := [e for e in gathered(mine, ranks) if e is not None]:
        raise min(found, key=lambda e: not isinstance(e, HopelessError))


def may_pass(error: BaseException) -> TypeGuard[OSError]:
    """Return whether the system could not read, and may be able to after a retry."""
    return isinstance(error, OSError) and error.errno is not None and error.errno not in _OF_THE_FILE


def cause_of(error: Exception, size: int) -> str:
    """Return in one line why an image of `size` bytes cannot be decoded."""
    if isinstance(error, UnidentifiedImageError):  # its own text is the address of a buffer
        return f"no image in its {size} bytes"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split()) or type(error).__name__


def shared_memory(error: Exception, workers: int, bus_error: bool) -> SharedMemoryError | None:
    """Return the error of a full /dev/shm behind `error` of a loader with `workers` processes, or None.

    `bus_error` says that such an error ended a process: of memory that a full /dev/shm cannot give.
    """
    said = (str(error).strip().splitlines() or [""])[-1].removeprefix("RuntimeError: ")
    if not bus_error and not _NO_SPACE.search(said):
        return None
    size = ""
    with suppress(OSError):
        size = f" of {shutil.disk_usage(SHARED_MEMORY).total / 2**20:,.0f} MiB"
    remedy = f"use fewer data.workers, now {workers}, or enlarge {SHARED_MEMORY} (docker run --shm-size=8g)"
    if bus_error:
        said, remedy = "a loader process that a bus error ended", f"{remedy}; where it is not full, a packed file has become shorter"
    return SharedMemoryError(f"{SHARED_MEMORY}{size} must have room for the batches of all loader processes; got {said}: {remedy}")
