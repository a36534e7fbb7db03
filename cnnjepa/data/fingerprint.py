"""Tell a user's set of images from what it was yesterday.

The fingerprint of a set says how many images it has and holds a digest of its listing: the name
(relative to the folder of the split), size in bytes and label of each image, in order. The folder's
own path is not in it, so that a set that was moved, staged, or packed as it came keeps it. With
`data.verify=full` the digest covers the images' bytes too; without, an image that is replaced by
another one of equal size is not noticed.
"""

import hashlib
import itertools
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cnnjepa.config import TrainConfig
from cnnjepa.data.datasets import IMAGENETS, Dataset, FolderImages, Splits, require_whole
from cnnjepa.data.faults import raise_alike
from cnnjepa.data.packed import PackedImages
from cnnjepa.data_config import DataConfig, Verify
from cnnjepa.run import checkpoint
from cnnjepa.run.consistency import ImagesChangedError
from cnnjepa.run.files import write_atomic
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.ranks import Ranks

# Calls that wait for a network file system: many at once cost little.
_THREADS = 16
_CHUNK = 2048
_TRUSTED_SECONDS = 600.0


def fingerprint(dataset: Dataset, config: DataConfig, fresh: bool = True) -> str:
    """Return '1200 training and 300 test images, listing 1a2b3c4d5e6f7a8b'.

    Unless `fresh`, the sizes of files are not read again if the last call for these folders was less
    than ten minutes ago, and names and times of the folders are as they were.
    """
    parts: dict[str, Any] = dict(dataset.parts)
    lines = [
        [f"{split}/{name}\0{label}" for name, label in zip(images.names(), images.labels.tolist(), strict=True)]
        for split, images in parts.items()
    ]
    if config.verify is Verify.full:
        return f"{dataset.counted}, content {_digest(lines, map(_contents, parts.values()))}"
    note = _note(parts) if all(isinstance(images, FolderImages) for images in parts.values()) else None
    state = "" if note is None else _state(parts, lines)
    known = "" if note is None or fresh else _noted(note, state)
    found = known or _digest(lines, map(_sizes, parts.values()))
    if note is not None and not known:
        with suppress(OSError):  # a full or read-only home costs time only
            note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(note, f"{state} {found}")
    return f"{dataset.counted}, listing {found}"


def difference(dataset: Dataset, config: DataConfig, fresh: bool = True) -> str:
    """Return how the images differ from those that the run was planned with, or ""."""
    if not config.fingerprint:  # another set, or a run of version 0.1
        return ""
    verify = Verify.full if ", content " in config.fingerprint else Verify.listing
    now = fingerprint(dataset, replace(config, verify=verify), fresh)
    if now == config.fingerprint:
        return ""
    rule = f"data.root must hold the images that the run was planned with, {config.fingerprint}"
    return f"{rule}; got {now} in {config.root}: restore them, or begin a new run with start_again=true, a sweep with --start-again"


def require_planned_images(config: TrainConfig, splits: Splits, folder: RunFolder, ranks: Ranks) -> None:
    """Raise ImagesChangedError on every rank unless the images are those that the run was planned with.

    The main rank compares them. A run that begins minutes after its planning relies on that listing
    where the folders have not changed since.
    """
    cause, fault = "", None
    try:
        if ranks.is_main and config.data.name in IMAGENETS:
            require_whole(config.data, splits.dataset)
        elif ranks.is_main:
            cause = difference(splits.dataset, config.data, fresh=bool(checkpoint.find(folder.checkpoints)))
    except ValueError as error:
        cause = str(error)
    except OSError as error:
        fault = error
    raise_alike(ImagesChangedError(cause) if cause else fault, ranks)


def _digest(lines: Iterable[list[str]], details: Iterable[Iterable[object]]) -> str:
    """Return 16 hex digits of the lines of each split, each with its detail."""
    digest = hashlib.sha256()
    for of_split, more in zip(lines, details, strict=True):
        digest.update("".join(f"{line}\0{detail}\n" for line, detail in zip(of_split, more, strict=True)).encode())
    return digest.hexdigest()[:16]


def _sizes(images: FolderImages | PackedImages) -> list[int]:
    if isinstance(images, PackedImages):
        return images.sizes()
    paths = images.paths.tolist()
    chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [size for sizes in pool.map(lambda chunk: [os.stat(path).st_size for path in chunk], chunks) for size in sizes]


def _contents(images: FolderImages | PackedImages) -> list[str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(lambda i: hashlib.sha256(images.encoded(i)).hexdigest(), range(len(images))))


def _note(parts: dict[str, FolderImages]) -> Path:
    """Return the file that keeps the last digest of these folders."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    where = "\0".join(os.path.realpath(images.folder) for images in parts.values())
    return cache / "cnnjepa" / "listings" / hashlib.sha256(where.encode()).hexdigest()[:16]


def _state(parts: dict[str, FolderImages], lines: Iterable[list[str]]) -> str:
    """Return a digest of the names and of the times of their folders, which change with the names."""
    folders = sorted({os.path.dirname(path) for images in parts.values() for path in images.paths.tolist()})
    times = [str(os.stat(folder).st_mtime_ns) for folder in folders]
    return hashlib.sha256("\n".join([*itertools.chain(*lines), *times]).encode()).hexdigest()[:16]


def _noted(note: Path, state: str) -> str:
    """Return the digest that was noted for `state`, or ""."""
    with suppress(OSError, ValueError):
        then, found = note.read_text().split()
        return found if then == state and time.time() - note.stat().st_mtime < _TRUSTED_SECONDS else ""
    return ""
