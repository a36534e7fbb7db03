"""Tell the files of a run's attempts apart.

An attempt is one claim of a trial; 0 is a run without claims. An owner that was suspended may wake
up after another process has claimed the next attempt. Each attempt therefore writes files whose
names carry its number, and a successor continues from copies of them. The name without a number is
a link to the newest attempt's file, for readers: a hard link, else a symbolic one. Where the file
system has neither, that name is missing, and `newest` finds the file.
"""

import contextlib
import math
import os
import re
from pathlib import Path

from cnnjepa.run.files import has_no_links, read_json

_CLAIM = re.compile(r"(\d+)\.json")


def newest_claim(run: Path) -> int:
    """Return the highest attempt that was claimed, or 0 if the run has no claims."""
    try:
        names = os.listdir(run / "claim")
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return max((int(found[1]) for name in names if (found := _CLAIM.fullmatch(name))), default=0)


def lost(run: Path, attempt: int) -> bool:
    """Return whether a later attempt was claimed. A run without claims is never lost."""
    return attempt > 0 and newest_claim(run) > attempt


def last_step(run: Path, attempt: int) -> float:
    """Return the last step of which a checkpoint of `attempt` counts; infinity for the newest one.

    The next claim says which step its owner could resume from. Whatever the attempt saved beyond
    that step, it saved after it had lost the trial.
    """
    path = run / "claim" / f"{attempt + 1:06d}.json"
    if attempt == 0 or not path.exists():
        return math.inf
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(read_json(path)["step"])
    return math.inf


def numbered(path: Path, attempt: int) -> Path:
    """Return the name of an attempt's own file: metrics.2.jsonl for metrics.jsonl."""
    return path.with_name(f"{path.stem}.{attempt}{path.suffix}") if attempt else path


def attempts_with(path: Path) -> list[int]:
    """Return the attempts that have a file of their own for `path`, newest first."""
    pattern = re.compile(rf"{re.escape(path.stem)}\.(\d+){re.escape(path.suffix)}")
    try:
        names = os.listdir(path.parent)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((int(found[1]) for name in names if (found := pattern.fullmatch(name))), reverse=True)


def newest(path: Path) -> Path:
    """Return the file that a reader of `path` reads: `path`, or without it the newest attempt's own file."""
    return path if path.exists() else next((numbered(path, number) for number in attempts_with(path)), path)


def publish(path: Path, attempt: int, run: Path) -> None:
    """Make `path` a link to the attempt's own file, unless the attempt is 0 or has lost the trial.

    Only readers use `path`, so a disk that refuses the link does no harm: `publish` is called again.
    """
    own = numbered(path, attempt)
    if own == path or lost(run, attempt):
        return
    beside = path.with_name(f".{path.name}.{attempt}.{os.urandom(4).hex()}.tmp")
    with contextlib.suppress(OSError):
        if path.exists() and path.samefile(own):
            return
        if _link(own, beside):
            os.replace(beside, path)
        else:
            path.unlink(missing_ok=True)  # it would show an earlier attempt


def _link(own: Path, name: Path) -> bool:
    """Make `name` a link to `own` in the same folder; return False where the file system has no links."""
    for make, target in ((os.link, str(own)), (os.symlink, own.name)):
        try:
            make(target, name)
            return True
        except OSError as error:
            if not has_no_links(error):
                raise
    return False
