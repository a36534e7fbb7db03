"""Files that are whole or not there: who creates one knows it, and a line is never torn, lost or written twice."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cnnjepa.run import files
from cnnjepa.run.files import Lines, create_exclusive, remove_partial, to_json, write_atomic


def overtaken(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    """A rival creates `target` at the last moment: right before the call that would give it its name."""

    def late(honest: Callable[..., None]) -> Callable[..., None]:
        def call(source: object, destination: object, **more: object) -> None:
            if Path(str(destination)) == target and not target.exists():
                target.write_text("the rival's")
            honest(source, destination, **more)

        return call

    for name in ("link", "replace", "rename"):
        monkeypatch.setattr(os, name, late(getattr(os, name)))


def test_whoever_is_overtaken_at_the_last_moment_has_not_created_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "claim.json"
    overtaken(monkeypatch, target)
    assert not create_exclusive(target, "ours")
    assert target.read_text() == "the rival's"
    assert list(tmp_path.iterdir()) == [target]


def test_of_two_who_create_a_file_the_second_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "claim.json"
    assert create_exclusive(target, "first")
    assert not create_exclusive(target, "second")
    assert target.read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_replaced_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut may take is not to be seen from a test; the order of the calls is."""
    calls: list[str] = []
    sync, replace, link = os.fsync, os.replace, os.link

    def synced(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append("sync the folder" if path.is_dir() else f"sync {path.read_text()}")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    monkeypatch.setattr(os, "link", lambda a, b: (calls.append("link"), link(a, b))[1])
    write_atomic(tmp_path / "a", "new")
    assert calls == ["sync new", "replace", "sync the folder"]
    calls.clear()
    assert create_exclusive(tmp_path / "b", "one")
    assert calls == ["sync one", "link", "sync the folder"]


def test_a_refused_write_leaves_the_old_content_and_nothing_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("old")

    def refuses(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuses)
    for write in (write_atomic, create_exclusive):
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    names = {"a", ".hidden", "b.tmp", ".a.host.7.tmp"}
    for name in names:
        (tmp_path / name).touch()
    remove_partial(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == names - {".a.host.7.tmp"}


class Refusing:
    """`os.write` of a disk that has room for so many bytes more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 10**9
        self._honest = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._honest(descriptor, data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", range(8))
def test_a_line_of_which_a_part_fits_is_not_torn_wherever_the_disk_ends(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each line takes 7 bytes, so that the disk ends before a line, within one, or right behind its end."""
    path = tmp_path / "lines"
    path.touch()
    lines, disk = Lines(path), Refusing(monkeypatch)
    lines.add("line 0")
    disk.room = room
    for i in range(1, 4):
        lines.add(f"line {i}")
    assert len(path.read_bytes()) <= 7 + room
    disk.room = 10**9
    lines.add("line 4")
    expected = "".join(f"line {i}\n" for i in range(5))
    assert path.read_text() == expected, "what waited goes with the next line"
    lines.sync()
    lines.close()
    assert path.read_text() == expected
    assert caplog.text.count("cannot be written") == 1


def test_lines_go_on_behind_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("before\n")
    lines = Lines(path)
    lines.add("after")
    lines.close()
    assert path.read_text() == "before\nafter\n"


def test_json_holds_no_number_that_others_cannot_read() -> None:
    assert json.loads(to_json({"b": 1, "a": [0.5, None]})) == {"a": [0.5, None], "b": 1}
    with pytest.raises(ValueError, match="Out of range float"):
        to_json({"a": float("nan")})


def test_a_partial_name_holds_host_and_process_so_that_two_writers_never_share_one(tmp_path: Path) -> None:
    """In two containers on one host both may be the same."""
    first, second = (files._write_beside(tmp_path / "a", b"") for _ in range(2))
    assert first.name.startswith(f".a.{os.uname().nodename}.{os.getpid()}.")
    assert first != second
