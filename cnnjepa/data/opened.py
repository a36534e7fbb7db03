"""Decode the images that probes will read, once, before hours of training rest on them.

Held-out and test images are always decoded. The other labelled training images are decoded too
where they are few: training decodes each of them in its first epoch anyway.
"""

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from cnnjepa.config import TrainConfig
from cnnjepa.data.datasets import FolderImages, Images, Indices, Splits, probed_sets
from cnnjepa.data.faults import OR_SKIP, REPAIR, DamagedImagesError, cause_of, may_pass, raise_alike
from cnnjepa.data.packed import PackedImages
from cnnjepa.data.pictures import UNREADABLE, EncodedPicture
from cnnjepa.data_config import OnBadImage
from cnnjepa.run.files import MANIFEST, to_json, write_atomic
from cnnjepa.run.ranks import Ranks

# Half a minute of one core at ImageNet's sizes. Above, training finds a damaged image itself.
FIT_IMAGES = 20_000
_CHUNK = 64

Files = FolderImages | PackedImages


def probe_files(splits: Splits) -> list[tuple[Files, Indices]]:
    """Return the images to decode; none of a set that is in memory as a whole."""
    data, fit = splits.dataset, splits.fit
    train = np.concatenate([fit, splits.holdout]) if len(fit) <= FIT_IMAGES else splits.holdout
    return in_files([(data.train, np.sort(train)), (data.test, splits.test)])


def in_files(parts: Sequence[tuple[Images, Indices]]) -> list[tuple[Files, Indices]]:
    """Return those of `parts` whose images are read from files when they are needed."""
    return [(images, indices) for images, indices in parts if isinstance(images, (FolderImages, PackedImages))]


@dataclass(frozen=True)
class Damaged:
    """An image that cannot be decoded."""

    index: int  # in its split
    place: str
    cause: str

    @property
    def line(self) -> str:
        """Return place and cause."""
        return f"{self.place}: {self.cause}"


def sets_to_check(config: TrainConfig, own: Splits) -> Iterator[tuple[str, Splits]]:
    """Yield key and images of each set that probes read, less the run's own where it skips bad images."""
    for key, splits in probed_sets(config, own):
        if splits is not own or config.data.on_bad_image is OnBadImage.stop:
            yield key, splits


def require_probe_images(config: TrainConfig, own: Splits, ranks: Ranks) -> None:
    """Raise DamagedImagesError on every rank if any probe image cannot be decoded; each decodes its share.

    Raise LoadingError if the system could not read one.
    """
    fault: Exception | None = None
    try:
        for key, splits in sets_to_check(config, own):
            require_decodable(splits, key, max(config.threads, config.data.workers), ranks.rank, ranks.count)
    except ValueError as error:
        fault = DamagedImagesError(str(error))
    except OSError as error:
        fault = error
    raise_alike(fault, ranks)


def require_decodable(splits: Splits, key: str, threads: int = 1, rank: int = 0, ranks: int = 1) -> None:
    """Raise ValueError, one line with `key`, unless this rank's share of the images can be decoded.

    Raise OSError, which names the file, if the system cannot read one now.
    """
    parts = [(images, indices[rank::ranks]) for images, indices in probe_files(splits)]
    if wrong := [found for part in look(parts, threads) for found in part]:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        remedy = OR_SKIP if key == "data.root" else REPAIR
        raise ValueError(f"{key} must hold images that can be decoded; got {wrong[0].line}{more}: {remedy}")


def look(parts: Sequence[tuple[Files, Indices]], threads: int) -> list[list[Damaged]]:
    """Decode the images; return those of each part that cannot be decoded.

    Of a share that was decoded before on this node, by the same user, only what was damaged then is
    decoded again while size and time of its files are the same.
    """
    if not parts:
        return []
    mark = _mark(parts)
    known = _known(mark)
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for number, (images, whole) in enumerate(parts):
            indices = whole if known is None else np.array(known[number], dtype=np.int64)
            chunks = [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]
            found.append([one for some in pool.map(partial(damaged, images), chunks) for one in some])
    if mark is not None and known is None:
        with contextlib.suppress(OSError):
            write_atomic(mark, to_json([[one.index for one in part] for part in found]))
    return found


def _known(mark: Path | None) -> list[list[int]] | None:
    """Return the indices of what was damaged, by part, or None without a mark."""
    with contextlib.suppress(OSError, ValueError):
        known: list[list[int]] = [] if mark is None else json.loads(mark.read_bytes())
        return known or None
    return None


def damaged(images: Images, indices: Sequence[int] | Indices) -> list[Damaged]:
    """Return the images that cannot be decoded to their last row; none of a set that is in memory.

    Raise OSError, which names the file, for an error of the system that may pass.
    """
    found: list[Damaged] = []
    if not isinstance(images, (FolderImages, PackedImages)):
        return found
    for index in map(int, indices):
        data: bytes | memoryview = b""
        try:
            data = images.encoded(index)
            EncodedPicture(data, channels=images.channels).pixels()
        except UNREADABLE as error:
            if may_pass(error):
                raise
            found.append(Damaged(index, images.place(index), cause_of(error, len(data))))
    return found


def _mark(parts: Sequence[tuple[Files, Indices]]) -> Path | None:
    """Return the file that says what was damaged of these images, as they are now; None where there can be none."""
    whole = hashlib.sha256()
    try:
        for images, indices in parts:
            whole.update(f"{images.channels} channels\n".encode())
            if isinstance(images, PackedImages):
                manifest = (images.paths[0].parent / MANIFEST).read_bytes()
                whole.update(manifest + indices.tobytes())
                paths = [str(path) for path in images.paths]
            else:
                paths = [images.place(int(index)) for index in indices]
            for path in paths:
                found = os.stat(path)
                whole.update(f"{path}\n{found.st_size} {found.st_mtime_ns}\n".encode())
        folder = Path(tempfile.gettempdir()) / f"cnnjepa-decoded-{os.geteuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        own = folder.lstat()  # not stat: another user could have made a link of this name
    except OSError:
        return None
    is_ours = stat.S_ISDIR(own.st_mode) and own.st_uid == os.geteuid() and not own.st_mode & 0o077
    return folder / whole.hexdigest() if is_ours else None
