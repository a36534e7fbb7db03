"""Inject file faults into a run's folder from outside, and undo those that pass by themselves."""

import contextlib
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

from cnnjepa.run import checkpoint


def truncate(checkpoints: Path, draw: random.Random) -> None:
    """Truncate the newest checkpoint at a random length."""
    newest = checkpoint.find(checkpoints)[0].path
    os.truncate(newest, draw.randrange(newest.stat().st_size))


def flip_a_bit(checkpoints: Path, draw: random.Random) -> None:
    """Flip one bit of the newest checkpoint. Its length stays."""
    newest = checkpoint.find(checkpoints)[0].path
    with open(newest, "r+b") as file:
        place = draw.randrange(newest.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << draw.randrange(8))]))


def hide_newest(checkpoints: Path, aside: Path) -> Path:
    """Move the newest checkpoint away, as if NFS hid its rename; return the new path."""
    newest = checkpoint.find(checkpoints)[0].path
    aside.mkdir(parents=True, exist_ok=True)
    return newest.rename(aside / newest.name)


def show_again(hidden: Path, checkpoints: Path) -> None:
    """Put the checkpoint back: the rename becomes visible."""
    hidden.rename(checkpoints / hidden.name)


@contextlib.contextmanager
def read_only(run: Path) -> Iterator[None]:
    """Make the run's folders read-only: no file in them can be made, renamed or removed."""
    folders = [run, *(p for p in run.rglob("*") if p.is_dir())]
    modes = {folder: folder.stat().st_mode & 0o7777 for folder in folders}
    for folder in reversed(folders):
        folder.chmod(0o555)
    try:
        yield
    finally:
        for folder in folders:
            folder.chmod(modes[folder])


def move_clock_of_files(folder: Path, seconds: float) -> None:
    """Set the times of all files in `folder` to `seconds` from now."""
    then = time.time() + seconds
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (then, then))
