"""Find out whether a folder's file system does what claims need. Runs on this machine, and in preflight's job on a node."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

from cnnjepa.run.files import create_exclusive, has_no_links, links_work, write_atomic

Found = tuple[str, str, str]  # level, what and said of a Finding

_CREATORS, _NAMES = 4, 10
# Claims allow for 180 s: STALE_SECONDS in sweeps/state/claims.py.
_CLOCK_SECONDS = 60.0
_TRY_ELSEWHERE = "choose a runs folder on another file system, or ask the site"


def check_files(runs_dir: Path) -> list[Found]:
    """Create, rename, sync, list and date files in a folder of their own below `runs_dir`; return what was found."""
    found = []
    folder = Path(tempfile.mkdtemp(prefix=".preflight-", dir=runs_dir))
    try:
        for what, check in _CHECKS.items():
            try:
                level, said = check(folder)
            except OSError as error:
                level, said = "problem", f"the runs folder must allow it; got {error.strerror}: {_TRY_ELSEWHERE}"
            found.append((level, what, said))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def way(folder: Path) -> str:
    """Return how files are created exclusively there, in words."""
    return "by hard links" if links_work(folder) else "by renaming folders, since there are no hard links"


def _claims(folder: Path) -> tuple[str, str]:
    start = Barrier(_CREATORS)

    def wins(name: str) -> bool:
        start.wait()
        return create_exclusive(folder / name, "")

    with ThreadPoolExecutor(_CREATORS) as pool:
        won = [sum(pool.map(wins, [f"claim-{number}"] * _CREATORS)) for number in range(_NAMES)]
    if wrong := [count for count in won if count != 1]:
        return "problem", f"one of {_CREATORS} who create a file must have created it; got {wrong[0]}: {_TRY_ELSEWHERE}"
    return "ok", f"one of {_CREATORS} who create a file at once has created it, {way(folder)}"


def _replacing(folder: Path) -> tuple[str, str]:
    path = folder / "replaced"
    for text in ("old", "new"):
        write_atomic(path, text)
    if (text := path.read_text()) != "new":
        return "problem", f"a file that is renamed over another must replace it; got {text}: {_TRY_ELSEWHERE}"
    return "ok", "a renamed file replaces another"


def _syncing(folder: Path) -> tuple[str, str]:
    with open(folder / "synced", "wb") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
    return "ok", "a file can be synced to the disk"


def _listing(folder: Path) -> tuple[str, str]:
    names = [f"listed-{number}" for number in range(_NAMES)]
    for name in names:
        (folder / name).touch()
        if name not in os.listdir(folder):
            return "problem", f"a new file must be listed at once; got a listing without it: {_TRY_ELSEWHERE}"
    return "ok", "a new file is listed at once"


def _dates(folder: Path) -> tuple[str, str]:
    path = folder / "dated"
    path.touch()
    os.utime(path, (0, 0))
    os.utime(path)  # a heartbeat
    ahead = path.stat().st_mtime - time.time()
    if path.stat().st_mtime < _CLOCK_SECONDS:
        return "problem", f"a file's date must be set to now; got one that stays: {_TRY_ELSEWHERE}"
    if abs(ahead) > _CLOCK_SECONDS:
        said = f"the server's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
        return "warning", f"{said}; a living run may be taken for dead: have the clocks synchronized"
    return "ok", f"the server's clock and this machine's are {abs(ahead):.0f} s apart"


def _links(folder: Path) -> tuple[str, str]:
    if links_work(folder):
        return "ok", "there are hard links"
    try:
        os.symlink("nowhere", folder / "link")
    except OSError as error:
        if not has_no_links(error):
            raise
        instead = "metrics.jsonl and train.log are named by attempt alone, as in metrics.2.jsonl"
        return "ok", f"there are no links: checkpoints are copied when a run is taken over, {instead}"
    return "ok", "there are no hard links: checkpoints are copied when a run is taken over"


_CHECKS: dict[str, Callable[[Path], tuple[str, str]]] = {
    "claims": _claims,
    "replacing": _replacing,
    "syncing": _syncing,
    "listing": _listing,
    "dates": _dates,
    "links": _links,
}


def leave_for_other(folder: Path, by: str) -> None:
    """Create a file that the other machine must find in `folder`, and how this one creates files."""
    create_exclusive(folder / f"by-{by}", way(folder))


def check_other(folder: Path, by: str) -> list[Found]:
    """Check that what the other machine left is seen here, cannot be created once more, and that both create alike."""
    name, here = f"by-{by}", way(folder)
    if name not in os.listdir(folder) or create_exclusive(folder / name, here):
        return [("problem", "shared", f"a file of {by} must be seen by all machines at once; got none: {_TRY_ELSEWHERE}")]
    if (there := (folder / name).read_text()) != here:
        said = f"all machines must create files in one way; got {here} here, {there} on {by}"
        return [("problem", "shared", f"{said}: use one kind of mount everywhere")]
    return []
