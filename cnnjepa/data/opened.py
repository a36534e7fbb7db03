"""Decode the images that probes will read, once, before hours of training rest on them.

Held-out and test images are always decoded. The other labelled training images are decoded too
where they are few: training decodes each of them in its first epoch anyway.
"""

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cnnjepa.data.datasets import FolderImages, Images, Indices, Splits
from cnnjepa.data.packed import PackedImages
from cnnjepa.data.pictures import UNREADABLE, EncodedPicture
from cnnjepa.run.files import MANIFEST

# Half a minute of one core at ImageNet's sizes. Above, training finds a damaged image itself.
FIT_IMAGES = 20_000
_CHUNK = 64

Files = FolderImages | PackedImages


def probe_files(splits: Splits) -> list[tuple[Files, Indices]]:
    """Return the images to decode; none of a set that is in memory as a whole."""
    data, fit = splits.dataset, splits.fit
    train = np.concatenate([fit, splits.holdout]) if len(fit) <= FIT_IMAGES else splits.holdout
    parts = [(data.train, np.sort(train)), (data.test, splits.test)]
    return [(images, indices) for images, indices in parts if isinstance(images, (FolderImages, PackedImages))]


def require_decodable(splits: Splits, key: str, threads: int = 1, rank: int = 0, ranks: int = 1) -> None:
    """Raise ValueError, one line with `key`, unless this rank's share of the images can be decoded.

    A share that was decoded before on this node, by the same user, is not decoded again while size
    and time of its files are the same.
    """
    parts = [(images, indices[rank::ranks]) for images, indices in probe_files(splits)]
    if not parts:
        return
    mark = _mark(parts)
    if mark is not None and mark.exists():
        return
    wrong: list[str] = []
    with ThreadPoolExecutor(threads) as pool:
        for images, indices in parts:
            chunks = [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]
            wrong += [line for lines in pool.map(partial(damaged, images), chunks) for line in lines]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{key} must hold images that can be decoded; got {wrong[0]}{more}: repair or remove it, then run again")
    if mark is not None:
        with contextlib.suppress(OSError):
            mark.touch()


def damaged(images: Images, indices: Sequence[int] | Indices) -> list[str]:
    """Return place and cause of each image that cannot be decoded to its last row."""
    found: list[str] = []
    if not isinstance(images, (FolderImages, PackedImages)):
        return found
    for index in map(int, indices):
        try:
            data = images.encoded(index)
            EncodedPicture(data, channels=images.channels).pixels()
        except UnidentifiedImageError:
            found.append(f"{images.place(index)}: no image in its {len(data)} bytes")
        except (*UNREADABLE, Image.DecompressionBombError) as error:
            found.append(f"{images.place(index)}: {' '.join(str(error).split())}")
    return found


def _mark(parts: list[tuple[Files, Indices]]) -> Path | None:
    """Return the file that says that these images, as they are now, were decoded; None where there can be none."""
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
