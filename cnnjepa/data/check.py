"""Check a packed folder against its manifest: `python -m cnnjepa.data.check FOLDER [--decode]`."""

import functools
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from cnnjepa.data.packed import Manifest, PackedFile, PackedImages, read_manifest
from cnnjepa.data.pictures import UNREADABLE, EncodedPicture
from cnnjepa.run.command_line import Parser

# called with the number of images that this process has finished
_tell: Callable[[int], None] | None = None


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of the file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _start(counter: "Synchronized[int]", parent: int) -> None:
    """Set up a worker: report finished images to the parent, and exit when the parent is gone."""
    global _tell

    def tell(images: int) -> None:
        with counter.get_lock():
            counter.value += images

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    _tell = tell
    threading.Thread(target=watch, daemon=True).start()


def done(images: int = 1) -> None:
    """Report that `images` more images are done."""
    if _tell is not None:
        _tell(images)


T = TypeVar("T")


def in_processes(what: str, images: int, workers: int, work: Callable[..., T], tasks: Iterable[tuple[object, ...]]) -> list[T]:
    """Return `work(*task)` of each task in order, with a progress bar that counts images.

    With one worker, the work runs in this process. An error stops the remaining tasks.
    """
    global _tell
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(show_speed=True),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(what, total=images)
        if workers > 1:
            return _on_workers(workers, work, tasks, lambda count: progress.update(bar, completed=count))
        _tell = functools.partial(progress.advance, bar)
        try:
            return [work(*task) for task in tasks]
        finally:
            _tell = None


def _on_workers(workers: int, work: Callable[..., T], tasks: Iterable[tuple[object, ...]], show: Callable[[int], None]) -> list[T]:
    context = get_context("spawn")
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, _start, (counter, os.getpid())) as pool:
        futures: list[Future[T]] = [pool.submit(work, *task) for task in tasks]
        waiting = set(futures)
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                show(counter.value)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
    return [future.result() for future in futures]


def check_file(folder: Path, file: PackedFile, classes: list[str], decode: bool) -> list[str]:
    """Return the faults of one packed file, one line each; decode every image if `decode`."""
    if (found := sha256_of(folder / file.name)) != file.sha256:
        return [f"{file.name} must have the sha256 {file.sha256}, as the manifest says; got {found}: copy or pack it again"]
    try:
        images = PackedImages(folder, Manifest(classes, [file]), file.split, classes)
    except ValueError as error:
        return [str(error)]
    if len(images) != file.images:
        return [f"{file.name} must hold {file.images} images with a class; got {len(images)}"]
    wrong = []
    for i in range(len(images)):
        if decode:
            try:
                EncodedPicture(images.encoded(i)).pixels()
            except UNREADABLE as error:
                wrong.append(f"{file.name} must hold images that can be decoded; got image {i}: {error}")
        done()
    return wrong


def check(folder: Path, manifest: Manifest, workers: int, decode: bool) -> list[str]:
    """Return the faults of a packed folder, one line each."""
    tasks = [(folder, file, manifest.classes, decode) for file in manifest.files]
    images = sum(file.images for file in manifest.files)
    found = in_processes("verified", images, min(workers, len(tasks)), check_file, tasks)
    return [line for lines in found for line in lines]


def main() -> int:
    """Run the command line and return the exit status, which --help explains."""
    text = """Verify a packed folder: compare its files with the manifest, byte by byte.

Exit status: 0 everything matches the manifest, 1 something differs,
2 no packed folder, or a file is missing or truncated."""
    example = "example:\n  python -m cnnjepa.data.check /scratch/in100 --decode"
    parser = Parser(prog="python -m cnnjepa.data.check", description=text, epilog=example)
    what = parser.add_argument_group("what to check")
    what.add_argument("folder", type=Path, metavar="FOLDER", help="folder that cnnjepa.data.pack wrote")
    what.add_argument("--decode", action="store_true", help="also decode every image once")
    how = parser.add_argument_group("how")
    how.add_argument("--workers", type=int, default=cores(), metavar="N", help="processes (default: all cores, %(default)s)")
    try:
        asked = parser.parse_args()
        manifest = read_manifest(asked.folder, "FOLDER")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wrong = check(asked.folder, manifest, max(asked.workers, 1), asked.decode)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    print(f"{asked.folder}: {len(manifest.files)} files, {sum(f.images for f in manifest.files)} images, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
