"""Know where a sweep folder is: it may be moved or copied while nothing runs.

`place.json` records the folder's path, and how files are created exclusively in it. A path that was
recorded elsewhere, in a submission or by a Slurm job's claim, tells what belongs to this folder.
"""

import os
from enum import Enum
from pathlib import Path

from cnnjepa.run.files import BY_FOLDERS, BY_LINKS, PLACE, create_by_folder, links_work, read_json, reading, sealed_json, write_atomic
from cnnjepa.run.typed import checked


class Place(Enum):
    """What a recorded path is to the sweep folder that holds the record."""

    here = "the folder itself, perhaps by another name"
    gone = "the path does not exist: the folder was moved, or another machine calls it so"
    elsewhere = "another folder, of which this one is a copy"


def place_of(recorded: Path, folder: Path) -> Place:
    """Return what the path `recorded` is to `folder`."""
    if recorded == folder:
        return Place.here
    try:
        return Place.here if os.path.samefile(recorded, folder) else Place.elsewhere
    except OSError:
        return Place.gone


def record_place(folder: Path) -> None:
    """Record the folder's path, and whether hard links work in it, once and again after it was moved or copied.

    Raise ValueError if its files are created by hard links, and this machine cannot make any.
    """
    path = folder / PLACE
    if not path.exists() and create_by_folder(path, _content(folder)):
        return
    with reading(path):
        values = read_json(path)
        recorded, way = checked(str, values["path"], "path"), checked(str, values["exclusive"], "exclusive")
    if place_of(Path(recorded), folder) is not Place.here:
        write_atomic(path, _content(folder))
    elif way == BY_LINKS and not links_work(folder):
        raise ValueError(
            f"{folder} must be on a mount with hard links, by which its claims are made; got one without: "
            "use the mount that the sweep was begun on, or copy the folder"
        )


def _content(folder: Path) -> str:
    return sealed_json({"path": str(folder), "exclusive": BY_LINKS if links_work(folder) else BY_FOLDERS})
