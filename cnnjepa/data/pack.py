"""Pack a data set into a few large files: `python -m cnnjepa.data.pack SOURCE TARGET`.

`--help` lists the sources and the exit statuses. Each file of TARGET is written under a temporary
name and renamed when complete. After a kill, the same command continues, and the packed bytes are
the same. Every image is decoded while it is packed.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from cnnjepa.data import sources
from cnnjepa.data.check import check, cores, done, in_processes
from cnnjepa.data.faults import cause_of, may_pass
from cnnjepa.data.imagenet import CLASS_LISTS, classes_of
from cnnjepa.data.packed import UNFINISHED, Manifest, PackedFile, read_manifest
from cnnjepa.data.pictures import UNREADABLE, EncodedPicture, as_ppm
from cnnjepa.data.sources import Entry
from cnnjepa.run.command_line import Parser
from cnnjepa.run.files import MANIFEST, sync_folder, to_json, write_atomic

SCHEMA = pa.schema([("image", pa.large_binary()), ("label", pa.int64()), ("name", pa.string())])
IMAGES_A_FILE = 8192  # about 0.9 GB of ImageNet
_IMAGES_A_BATCH = 256  # what a worker holds in memory


@dataclass(frozen=True)
class Stored:
    """Options for storing images, which stay unchanged by default.

    With `short_side`, images with a larger short side are shrunk to that many pixels and stored as
    JPEG of `quality`. With `decoded`, pixels are stored.
    """

    short_side: int = 0
    quality: int = 0
    decoded: bool = False  # the same pixels, 5 times the bytes, a third of the time to read


@dataclass(frozen=True)
class Part:
    """One file to write."""

    name: str
    split: str
    entries: list[Entry]


class _Hashed:
    """A file that is hashed while it is written, so that it need not be read again."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb")  # noqa: SIM115
        self.digest, self.bytes, self.closed = hashlib.sha256(), 0, False

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.bytes += memoryview(data).nbytes
        return self.file.write(data)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        if not self.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.closed = True


def _stored(data: bytes, picture: EncodedPicture, stored: Stored) -> bytes:
    side = min(picture.height, picture.width)
    pixels = picture.pixels()  # decoded even if unchanged: undecodable images must not be packed
    if stored.decoded:
        return as_ppm(pixels)
    if not stored.short_side or side <= stored.short_side:
        return data
    size = round(picture.width * stored.short_side / side), round(picture.height * stored.short_side / side)
    encoded = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS).save(encoded, "JPEG", quality=stored.quality)
    return encoded.getvalue()


def write_part(folder: Path, part: Part, stored: Stored, skip_corrupt: bool) -> tuple[PackedFile | None, list[str]]:
    """Write one file; return it, and names and errors of its images that cannot be decoded.

    Return None as the file if there are such images and `skip_corrupt` is False.
    """
    path, note = folder / part.name, folder / f".{part.name}.json"
    if note.exists() and path.exists():
        noted = json.loads(note.read_text())
        file = PackedFile(**noted["file"])
        if path.stat().st_size == file.bytes:
            done(len(part.entries))
            return file, noted["corrupt"]
    corrupt: list[str] = []
    beside = folder / f".{part.name}.{os.getpid()}.tmp"
    written, images = _Hashed(beside), 0

    def rows() -> Iterator[tuple[bytes, int, str]]:
        for entry in part.entries:
            data = b""
            try:
                data, label = sources.read(entry)
                yield _stored(data, EncodedPicture(data), stored), label, entry.name
            except UNREADABLE as error:
                if may_pass(error):  # the image may be whole
                    raise OSError(error.errno, error.strerror, f"{entry.path} ({part.split}/{entry.name})") from error
                corrupt.append(f"{part.split}/{entry.name}: {cause_of(error, len(data))}")
            done()

    try:
        with pa.ipc.new_file(pa.PythonFile(written, mode="w"), SCHEMA) as writer:
            batch: list[tuple[bytes, int, str]] = []
            for row in rows():
                batch.append(row)
                if len(batch) == _IMAGES_A_BATCH:
                    images += _write(writer, batch)
            images += _write(writer, batch)
        written.close()
        if corrupt and not skip_corrupt:
            return None, corrupt
        file = PackedFile(part.name, part.split, images, written.bytes, written.digest.hexdigest())
        os.replace(beside, path)
        sync_folder(folder)
        write_atomic(note, to_json({"file": vars(file), "corrupt": corrupt}))
    finally:
        written.close()
        beside.unlink(missing_ok=True)
    return file, corrupt


def _write(writer: Any, batch: list[tuple[bytes, int, str]]) -> int:
    if not batch:
        return 0
    writer.write_batch(pa.record_batch([pa.array(column, kind.type) for column, kind in zip(zip(*batch), SCHEMA)], schema=SCHEMA))
    images = len(batch)
    batch.clear()
    return images


def plan(source: sources.Source, images_a_file: int) -> list[Part]:
    """Divide the source into files of `images_a_file` consecutive images."""
    parts = []
    for split, entries in source.splits.items():
        for number, first in enumerate(range(0, len(entries), images_a_file)):
            parts.append(Part(f"{split}-{number:05}.arrow", split, entries[first : first + images_a_file]))
    return parts


def _identity(source: sources.Source, stored: Stored, images_a_file: int) -> dict[str, Any]:
    """Return the options and a digest of the images, which a continued packing must share."""
    digest = hashlib.sha256()
    for split, entries in source.splits.items():
        for e in entries:
            digest.update(f"{split}/{e.name} {e.label} {e.size}\n".encode())
    options = {"short_side": stored.short_side, "jpeg_quality": stored.quality, "decoded": stored.decoded, "images_per_file": images_a_file}
    return {**options, "images": sum(map(len, source.splits.values())), "listing_sha256": digest.hexdigest()}


def _begin(target: Path, source: sources.Source, identity: dict[str, Any]) -> None:
    """Prepare TARGET for this packing.

    Raise ValueError if TARGET belongs to another packing, has no room or cannot be written.
    """
    note = target / UNFINISHED
    if note.is_file():
        before = json.loads(note.read_text())
        if different := [k for k in identity if before.get(k) != identity[k]]:
            values = ", ".join(f"{k} {before.get(k)}, now {identity[k]}" for k in different)
            raise ValueError(f"TARGET must be new or an unfinished packing with the same options; got {target}: {values}")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"TARGET must be new, empty or an unfinished packing; got {target}")
    try:
        target.mkdir(parents=True, exist_ok=True)
        there = sum(p.stat().st_size for p in target.iterdir())
        free = shutil.disk_usage(target).free
        if not identity["short_side"] and not identity["decoded"] and (need := source.bytes() - there) > free:
            raise ValueError(f"TARGET must have room for {need / 1e9:.1f} GB; got {free / 1e9:.1f} GB free in {target}")
        write_atomic(note, to_json(identity))
    except OSError as error:
        raise ValueError(f"TARGET must be a folder that can be written; got {target}: {error}") from error
    for partial in target.glob(".*.tmp"):
        partial.unlink(missing_ok=True)  # left by a killed packing


def pack(
    source: sources.Source, target: Path, stored: Stored, workers: int, skip_corrupt: bool, images_a_file: int = IMAGES_A_FILE
) -> tuple[Manifest | None, list[str]]:
    """Pack `source` into `target`, or continue; return the manifest and a line per corrupt image.

    The manifest is None if there are corrupt images and `skip_corrupt` is False.
    """
    _begin(target, source, _identity(source, stored, images_a_file))
    parts = plan(source, images_a_file)
    tasks = [(target, part, stored, skip_corrupt) for part in parts]
    images = sum(len(p.entries) for p in parts)
    written = in_processes("packed", images, min(workers, len(tasks)), write_part, tasks)
    corrupt = [line for _, lines in written for line in lines]
    files = [file for file, _ in written if file is not None]
    if len(files) < len(parts):
        return None, corrupt
    skipped = {split: [line.split(": ")[0] for line in corrupt if line.startswith(f"{split}/")] for split in source.splits}
    assert sum(f.images for f in files) + len(corrupt) == images
    return Manifest(source.classes, files, stored.short_side, stored.quality, skipped), corrupt


def _classes(asked: str | None) -> list[str] | None:
    if asked is None:
        return None
    if asked in CLASS_LISTS:
        return classes_of(asked)
    try:
        return sorted(Path(asked).read_text().split())
    except OSError as error:
        raise ValueError(
            f"--classes must be {' or '.join(CLASS_LISTS)}, or a text file of class names; got {asked}: {error.strerror}"
        ) from error


def _run(asked: argparse.Namespace) -> int:
    if not 1 <= asked.quality <= 100 or asked.short_side < 0 or asked.workers < 1 or asked.images_per_file < 1:
        raise ValueError("--quality must lie in [1, 100], --workers and --images-per-file be at least 1, --short-side at least 0")
    if asked.unlabelled and asked.classes is not None:
        raise ValueError(f"--classes must be left out with --unlabelled; got {asked.classes}")
    if asked.decoded and asked.short_side:
        raise ValueError("--decoded must be left out with --short-side; got both")
    stored = Stored(asked.short_side, asked.quality if asked.short_side else 0, asked.decoded)
    if (asked.target / MANIFEST).is_file():
        manifest: Manifest | None = read_manifest(asked.target, "TARGET")
        print(f"{asked.target} is already complete; verifying it again")
    else:
        source = sources.find(asked.source, asked.root, _classes(asked.classes), not asked.unlabelled)
        if said := sources.said_of(source.left_out):
            print(said)
        manifest, corrupt = pack(source, asked.target, stored, asked.workers, asked.skip_corrupt, asked.images_per_file)
        for line in corrupt:
            print(f"corrupt: {line}", file=sys.stderr)
        if manifest is None:
            rule = "error: every image must be one that Pillow can decode"
            print(f"{rule}; got {len(corrupt)} that it cannot: repair them, or leave them out with --skip-corrupt", file=sys.stderr)
            return 1
    assert manifest is not None
    wrong = check(asked.target, manifest, asked.workers, asked.verify)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if wrong:
        return 1
    manifest.write(asked.target)
    for path in (asked.target / UNFINISHED, *asked.target.glob(".*.arrow.json")):
        path.unlink(missing_ok=True)
    train, val = (sum(f.images for f in manifest.files if f.split == split) for split in sources.SPLITS)
    skipped = sum(map(len, manifest.skipped.values()))
    size = sum(f.bytes for f in manifest.files)
    print(f"{asked.target}: {train} training and {val} validation images of {len(manifest.classes)} classes, {skipped} skipped")
    print(f"{len(manifest.files)} files, {size / 1e9:.2f} GB, verified{', every image decoded' if asked.verify else ''}")
    return 0


def main() -> int:
    """Run the command line and return the exit status."""
    text = """Pack a data set into a few large files. Run the same command again after a kill; the files come out the same.

SOURCE is one of
  a tree of images: train/<class>/<image> and val/<class>/<image>; of any form with --unlabelled
  the folder of ImageNet's tar files: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
    ILSVRC2012_devkit_t12.tar.gz
  torchvision:NAME, such as torchvision:FashionMNIST, read from --root

Exit status: 0 packed and verified, 1 an image cannot be decoded, a file differs or the
disk fails, 2 wrong usage."""
    example = "example:\n  python -m cnnjepa.data.pack /data/imagenet /scratch/in100 --classes imagenet100 --verify"
    parser = Parser(prog="python -m cnnjepa.data.pack", description=text, epilog=example)
    what = parser.add_argument_group("what to pack")
    what.add_argument("source", metavar="SOURCE", help="images to pack, see above")
    what.add_argument("target", metavar="TARGET", type=Path, help="folder to write")
    what.add_argument("--classes", help=f"{', '.join(CLASS_LISTS)}, or a text file of class names: pack only these (default: all)")
    what.add_argument("--unlabelled", action="store_true", help="pack all images of a tree without classes, for data=images")
    what.add_argument("--root", default="", metavar="DIR", help="folder of the set in torchvision's layout, for torchvision:NAME")
    what.add_argument("--skip-corrupt", action="store_true", help="leave out images that cannot be decoded; the manifest names them")
    stored = parser.add_argument_group("how images are stored")
    side = "shrink larger images to this many pixels; give runs the same data.short_side (default: keep the size)"
    stored.add_argument("--short-side", type=int, default=0, metavar="N", help=side)
    stored.add_argument("--quality", type=int, default=95, metavar="Q", help="JPEG quality of shrunk images (default: %(default)s)")
    stored.add_argument("--decoded", action="store_true", help="store pixels: 5 times the bytes, several times the reading speed")
    size = "images in each file (default: %(default)s, about 0.9 GB of ImageNet)"
    stored.add_argument("--images-per-file", type=int, default=IMAGES_A_FILE, metavar="N", help=size)
    how = parser.add_argument_group("how to run")
    how.add_argument("--verify", action="store_true", help="decode every packed image once more at the end")
    how.add_argument("--workers", type=int, default=cores(), metavar="N", help="processes (default: all cores, %(default)s)")
    try:
        asked = parser.parse_args()
        return _run(asked)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}: run the same command again to continue", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
