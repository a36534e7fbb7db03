"""Read packed image sets: Arrow files of encoded images and a manifest in one folder.

The manifest lists each file with its size and checksum. The files are memory-mapped, so all
processes of a node share their pages. Forked loader processes share the index, 22 bytes per image.
"""

import itertools
import json
import mmap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cnnjepa.data.pictures import EncodedPicture
from cnnjepa.run.files import MANIFEST, to_json, write_atomic

FORMAT = "cnnjepa-packed-1"
UNFINISHED = "packing.json"  # present until the manifest is written


@dataclass(frozen=True)
class PackedFile:
    """One Arrow file; its images follow those of the previous file."""

    name: str
    split: str  # train or val
    images: int
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """Contents of a packed folder. `skipped` names images left out because they do not decode."""

    classes: list[str]
    files: list[PackedFile]
    # Short side in pixels to which larger images were shrunk; 0: none was.
    short_side: int = 0
    jpeg_quality: int = 0  # of the images that were shrunk
    skipped: dict[str, list[str]] = field(default_factory=dict)
    format: str = FORMAT

    def write(self, folder: Path) -> None:
        """Write the manifest to `folder` atomically."""
        write_atomic(folder / MANIFEST, to_json(asdict(self)))


def is_packed(folder: Path) -> bool:
    """Return whether `folder` is a packed set, complete or not."""
    return (folder / MANIFEST).is_file() or (folder / UNFINISHED).is_file()


def read_manifest(folder: Path, key: str = "data.root") -> Manifest:
    """Return the manifest; raise ValueError naming `key` unless each file has its full size."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{key} must hold a complete packed set; got {folder}, which is unfinished: run the same packing command again")
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        manifest = Manifest(**{**values, "files": [PackedFile(**f) for f in values["files"]]})
    except (ValueError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{key} must hold a {MANIFEST} that this version can read, {FORMAT}; got {path}: {error!r}") from error
    if manifest.format != FORMAT:
        raise ValueError(f"{key} must hold a {MANIFEST} of the format {FORMAT}; got {manifest.format} in {path}")
    for file in manifest.files:
        try:
            size = (folder / file.name).stat().st_size
        except FileNotFoundError:
            raise ValueError(
                f"{key} must hold every file of its manifest; got {folder} without {file.name}: copy or pack it again"
            ) from None
        if size != file.bytes:
            rule = f"{key} must hold {file.name} with all of its {file.bytes} bytes"
            raise ValueError(f"{rule}; got {size} bytes in {folder}: copy or pack it again")
    return manifest


class PackedImages:
    """Images of one split, of the given classes, in the order of one folder per class."""

    def __init__(self, folder: Path, manifest: Manifest, split: str, classes: list[str], channels: int = 3) -> None:
        self.channels = channels
        self.paths = [folder / f.name for f in manifest.files if f.split == split]
        self._maps = [_map(path) for path in self.paths]
        parts = [_index(i, path, where) for i, (path, where) in enumerate(zip(self.paths, self._maps, strict=True))]
        wanted = np.full(len(manifest.classes), -1)
        for label, name in enumerate(classes):
            wanted[manifest.classes.index(name)] = label
        file, start, size, label_of = (np.concatenate(column) for column in zip(*parts))
        labels = wanted[label_of]
        kept = labels >= 0
        self.labels: npt.NDArray[np.int64] = labels[kept]
        self._file, self._start, self._size, self._kept = file[kept], start[kept], size[kept], kept

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        # a process that was not forked maps the files itself
        return {**self.__dict__, "_maps": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._maps = [_map(path) for path in self.paths]

    def names(self) -> list[str]:
        """Return the name of each image, <class>/<file> of the tree that was packed."""
        import pyarrow as pa

        names: list[str] = []
        for mapped in self._maps:
            reader = pa.ipc.open_file(pa.py_buffer(mapped))
            for i in range(reader.num_record_batches):
                names += reader.get_batch(i).column("name").to_pylist()
        return list(itertools.compress(names, self._kept.tolist()))

    def sizes(self) -> list[int]:
        """Return the bytes of each image file."""
        return [int(size) for size in self._size.tolist()]

    def place(self, index: int) -> str:
        """Return the packed file that holds the image at `index`, and the image's number there."""
        file = int(self._file[index])
        before = _index(file, self.paths[file], self._maps[file])[1] < self._start[index]
        return f"{self.paths[file]}, image {int(before.sum())}"

    def encoded(self, index: int) -> memoryview:
        """Return the bytes of the image file at `index` without copying them."""
        start = int(self._start[index])
        return memoryview(self._maps[self._file[index]])[start : start + int(self._size[index])]

    def pictures(self, indices: list[int]) -> list[EncodedPicture]:
        """Return the images at `indices`.

        The system is told about all of them before the first is decoded, so that it can read ahead.
        """
        for index in indices:
            first = int(self._start[index]) // mmap.PAGESIZE * mmap.PAGESIZE
            length = int(self._start[index]) + int(self._size[index]) - first
            self._maps[self._file[index]].madvise(mmap.MADV_WILLNEED, first, length)
        return [EncodedPicture(self.encoded(index), sound=True, channels=self.channels) for index in indices]


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.madvise(mmap.MADV_RANDOM)
    return mapped


def _index(number: int, path: Path, mapped: mmap.mmap) -> tuple[npt.NDArray[Any], ...]:
    """Return file number, first byte, length and label of each image of one file.

    Raise ValueError if the file is not an Arrow file with the columns image and label.
    """
    import pyarrow as pa

    whole = pa.py_buffer(mapped)
    starts, sizes, labels = [], [], []
    try:
        reader = pa.ipc.open_file(whole)
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            _, offsets, data = batch.column("image").buffers()
            bounds = np.frombuffer(offsets, np.int64, len(batch) + 1)
            starts.append(bounds[:-1] + (data.address - whole.address))
            sizes.append(np.diff(bounds).astype(np.int32))
            labels.append(batch.column("label").to_numpy())
    except (pa.ArrowException, KeyError, OSError) as error:
        raise ValueError(f"{path} must be an Arrow file with the columns image and label; got {' '.join(str(error).split())}") from error
    start = np.concatenate(starts)
    return np.full(len(start), number, np.int16), start, np.concatenate(sizes), np.concatenate(labels).astype(np.int64)
