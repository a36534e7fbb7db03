"""What preflight finds out about the file system of the runs folder, each fault of which is a fake but for exFAT."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import file_system
from jobs.file_system import check_files, check_other, leave_for_other
from tests.support.no_links import exfat, refuse_links

WHAT = ["claims", "replacing", "syncing", "listing", "dates", "links"]
ELSEWHERE = "choose a runs folder on another file system, or ask the site"


def found_in(folder: Path) -> dict[str, tuple[str, str]]:
    found = {what: (level, said) for level, what, said in check_files(folder)}
    assert list(found) == WHAT
    assert os.listdir(folder) == []
    return found


def test_a_sound_file_system_gives_a_line_for_each_thing(tmp_path: Path) -> None:
    assert found_in(tmp_path) == {
        "claims": ("ok", "one of 4 who create a file at once has created it, by hard links"),
        "replacing": ("ok", "a renamed file replaces another"),
        "syncing": ("ok", "a file can be synced to the disk"),
        "listing": ("ok", "a new file is listed at once"),
        "dates": ("ok", "the server's clock and this machine's are 0 s apart"),
        "links": ("ok", "there are hard links"),
    }


@pytest.mark.nightly
def test_exfat_does_what_claims_need(tmp_path: Path) -> None:
    with exfat(tmp_path) as root:
        found = found_in(root)
    assert {level for level, _ in found.values()} == {"ok"}
    assert found["claims"][1].endswith("has created it, by renaming folders, since there are no hard links")
    assert found["links"][1].startswith("there are no links: checkpoints are copied when a run is taken over, metrics.jsonl and train.log")


def all_win(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(file_system, "create_exclusive", lambda path, text: True)


def nothing_is_replaced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(file_system, "write_atomic", lambda path, text: None if path.exists() else path.write_text(text))


def a_replacing_is_refused(patch: pytest.MonkeyPatch) -> None:
    honest = os.replace

    def replace(source: Path, target: Path) -> None:
        if Path(target).exists():
            raise OSError(errno.EACCES, "Permission denied")
        honest(source, target)

    patch.setattr(os, "replace", replace)


def no_sync(patch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("synced"):
            raise OSError(errno.EINVAL, "Invalid argument")

    patch.setattr(os, "fsync", fsync)


def an_old_listing(patch: pytest.MonkeyPatch) -> None:
    honest = os.listdir
    patch.setattr(os, "listdir", lambda folder: [name for name in honest(folder) if not name.startswith("listed-7")])


def dates_stay(patch: pytest.MonkeyPatch) -> None:
    honest = os.utime
    patch.setattr(os, "utime", lambda path, times=None: honest(path, (9, 9)))


def clock(seconds: float) -> Callable[[pytest.MonkeyPatch], None]:
    honest = time.time
    return lambda patch: patch.setattr(time, "time", lambda: honest() - seconds)


@pytest.mark.parametrize(
    ("fault", "what", "level", "said"),
    [
        (all_win, "claims", "problem", f"one of 4 who create a file must have created it; got 4: {ELSEWHERE}"),
        (nothing_is_replaced, "replacing", "problem", f"a file that is renamed over another must replace it; got old: {ELSEWHERE}"),
        (a_replacing_is_refused, "replacing", "problem", f"the runs folder must allow it; got Permission denied: {ELSEWHERE}"),
        (no_sync, "syncing", "problem", f"the runs folder must allow it; got Invalid argument: {ELSEWHERE}"),
        (an_old_listing, "listing", "problem", f"a new file must be listed at once; got a listing without it: {ELSEWHERE}"),
        (dates_stay, "dates", "problem", f"a file's date must be set to now; got one that stays: {ELSEWHERE}"),
        (clock(300), "dates", "warning", "the server's clock is 300 s ahead of this machine's; a living run may be taken for dead: "),
        (clock(-90), "dates", "warning", "the server's clock is 90 s behind this machine's; a living run may be taken for dead: "),
    ],
)
def test_each_fault_is_found_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None], what: str, level: str, said: str
) -> None:
    with monkeypatch.context() as patch:
        fault(patch)
        found = {what: (level, said) for level, what, said in check_files(tmp_path)}
    assert found[what][0] == level
    assert found[what][1].startswith(said)
    assert [name for name, (level, _) in found.items() if level != "ok"] == [what]


def test_two_machines_see_each_others_files_and_create_files_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_for_other(tmp_path, "this machine")
    assert check_other(tmp_path, "this machine") == []
    ((level, what, said),) = check_other(tmp_path, "the node")
    assert (level, what) == ("problem", "shared")
    assert said == f"a file of the node must be seen by all machines at once; got none: {ELSEWHERE}"
    refuse_links(monkeypatch)
    ((level, what, said),) = check_other(tmp_path, "this machine")
    assert (level, what) == ("problem", "shared")
    assert said.startswith(
        "all machines must create files in one way; got by renaming folders, since there are no hard links here, by hard links on"
    )
