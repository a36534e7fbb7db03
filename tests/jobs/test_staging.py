"""Packed sets on a node's own disk: real files, real processes, real locks; what does not fit is a file that does not."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import staging
from jobs.staging import PackedSet, Staging, StagingError, own_folder, try_lock
from tests.support.staging import BYTES, FILES, assert_same_files, child, copied_bytes, end, packed, set_of, settle


def test_processes_that_come_at_once_copy_once(source: Path, scratch: Path) -> None:
    said = [end(p) for p in [child(source, scratch) for _ in range(4)]]
    total = sum(BYTES + i for i in range(FILES))
    assert copied_bytes("\n".join(said)) == [total]
    folder = own_folder(str(scratch)) / set_of(source).key
    assert all(f"root {folder}\n" in s for s in said)
    assert_same_files(source, folder)
    assert (scratch / f"cnnjepa-{os.geteuid()}").stat().st_mode & 0o777 == 0o700


def test_who_gets_the_lock_just_after_the_copy_copies_nothing(
    source: Path, scratch: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(path: Path, how: int) -> int | None:
        monkeypatch.setattr(staging, "try_lock", try_lock)
        settle(source, scratch)
        return try_lock(path, how)

    monkeypatch.setattr(staging, "try_lock", overtaken)
    assert settle(source, scratch).root != source
    assert copied_bytes(capsys.readouterr().out) == [sum(BYTES + i for i in range(FILES))]


def test_the_next_job_copies_nothing(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = settle(source, scratch)
    capsys.readouterr()
    assert settle(source, scratch).root == first.root != source
    assert capsys.readouterr().out == ""


def test_a_copier_killed_in_the_middle_is_followed_by_one_that_waited(source: Path, scratch: Path) -> None:
    first = child(source, scratch, until=3)
    assert first.stdout is not None
    assert "copying" in first.stdout.readline()
    assert "root" in first.stdout.readline()  # it stands still within the fourth file
    assert list(scratch.rglob("*.tmp"))
    second = child(source, scratch)
    assert second.stdout is not None
    assert "waiting for the process that copies" in second.stdout.readline()
    time.sleep(0.5)
    assert second.poll() is None
    assert not (own_folder(str(scratch)) / set_of(source).key).exists(), "what is not whole has not its name"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert copied_bytes(end(second)) == [sum(BYTES + i for i in range(3, FILES))]
    assert_same_files(source, own_folder(str(scratch)) / set_of(source).key)
    assert not list(scratch.rglob("*.partial"))


def test_a_copier_that_is_stopped_leaves_checked_files_and_no_lock(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Staging(set_of(source), str(scratch)) as staging:
        while len(list(scratch.rglob("file-?"))) < 3 or not list(scratch.rglob("*.tmp")):
            assert not staging.advance(0)
    assert sorted(p.name for p in scratch.rglob("file-*")) == ["file-0", "file-1", "file-2"]
    assert_same_files(source, settle(source, scratch).root)
    assert copied_bytes(capsys.readouterr().out) == [sum(BYTES + i for i in range(3, FILES))]


def test_a_damaged_copy_is_noticed_by_its_sizes_and_repaired(source: Path, scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = settle(source, scratch).root
    os.truncate(root / "file-2", BYTES // 2)
    (root / "file-5").unlink()
    capsys.readouterr()
    assert settle(source, scratch).root == root
    assert copied_bytes(capsys.readouterr().out) == [2 * BYTES + 7]
    assert_same_files(source, root)


def test_a_damaged_copy_that_a_run_reads_is_left_alone(source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_DAMAGED_SECONDS", 0.5)
    with Staging(set_of(source), str(scratch)) as reader:
        while not reader.advance():
            pass
        os.truncate(reader.root / "file-2", 10)
        other = settle(source, scratch)
        assert (other.root, other.cause) == (source, f"{reader.root} is damaged, and another run is reading it")
    assert settle(source, scratch).root == reader.root


def test_damage_is_waited_out_for_a_while_since_a_lock_may_only_change_hands(
    source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    with Staging(set_of(source), str(scratch)) as reader, Staging(set_of(source), str(scratch)) as other:
        while not reader.advance():
            pass
        os.truncate(reader.root / "file-2", 10)
        monkeypatch.setattr(staging, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda _: None))
        assert not other.advance(0)
        clock[0] += 10  # _DAMAGED_SECONDS
        assert not other.advance(0)
        clock[0] += 0.1
        assert other.advance(0)
        assert (other.root, other.cause) == (source, f"{reader.root} is damaged, and another run is reading it")


def test_sets_are_distinguished_by_their_manifests(source: Path, scratch: Path, tmp_path: Path) -> None:
    other = packed(tmp_path / "other", seed=1)
    for folder in (source, other):
        assert_same_files(folder, settle(folder, scratch).root)
    assert set_of(source).key != set_of(other).key


def test_what_does_not_fit_stays_where_it_is(source: Path, scratch: Path) -> None:
    os.truncate(source / "file-3", 2**43)  # 8 TB that take no room here
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["files"][3]["bytes"] = 2**43
    (source / "manifest.json").write_text(json.dumps(manifest))
    result = settle(source, scratch)
    assert result.root == source
    assert result.cause.startswith("8796.1 GB do not fit into the ")
    assert f"`python -m jobs.stage --list {scratch}` shows what is there" in result.cause
    assert [p.suffix for p in own_folder(str(scratch)).iterdir()] == [".lock"]


def test_a_set_may_fill_a_disk_to_the_last_byte_that_is_not_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A twentieth of a disk of 1,000 bytes stays free, and 10 GB of one of 1 TB."""
    for total, free, most in ((1000, 500, 450), (10**12, 500 * 10**9, 490 * 10**9)):
        monkeypatch.setattr(staging.shutil, "disk_usage", lambda folder, total=total, free=free: SimpleNamespace(total=total, free=free))
        assert staging.shortage(most, tmp_path) == ""
        assert f" do not fit into the {free / 1e9:.1f} GB free in {tmp_path}" in staging.shortage(most + 1, tmp_path)


def test_some_room_is_left_to_others(tmp_path: Path) -> None:
    assert staging.kept_free(10**6) == 50_000
    assert staging.kept_free(10**13) == 10**10
    free = os.statvfs(tmp_path)
    assert "stay free" in staging.shortage(free.f_bavail * free.f_frsize - 1000, tmp_path)
    assert staging.shortage(1000, tmp_path) == ""


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks_is_left_alone(source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A fake, named as such: the system refuses the lock."""

    def refuse(file: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(staging.fcntl, "flock", refuse)
    result = settle(source, scratch)
    assert (result.root, result.cause) == (source, f"[Errno {number}] {os.strerror(number)}")
    assert [p.suffix for p in own_folder(str(scratch)).iterdir()] == [".lock"]


def test_a_copy_that_fails_leaves_nothing(source: Path, scratch: Path) -> None:
    """The system refuses longer files, as a full disk would."""
    said = end(child(source, scratch, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES + 2, BYTES + 2))))
    assert f"root {source}\n" in said
    assert "cause [Errno 27] File too large" in said
    assert [p.suffix for p in own_folder(str(scratch)).iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda f: f.write_bytes(bytes(f.stat().st_size)), "must have the sha256 "),
        (lambda f: os.truncate(f, 9), f"must have the {BYTES + 4} bytes of its manifest; got 9"),
        (lambda f: f.unlink(), "No such file or directory"),
    ],
)
def test_a_damaged_source_is_not_staged(source: Path, scratch: Path, damage: object, cause: str) -> None:
    damage(source / "file-4")  # type: ignore[operator]
    result = settle(source, scratch)
    assert result.root == source
    assert cause in result.cause
    assert "file-4" in result.cause
    assert not list(scratch.rglob("file-*"))


def test_a_folder_that_cannot_be_written_or_is_not_private_is_not_used(
    source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, elsewhere = scratch / f"cnnjepa-{os.geteuid()}", scratch / "elsewhere"
    assert settle(source, "/sys").root == source  # which not even root can write
    assert "No such file or directory" in settle(source, scratch / "none").cause
    monkeypatch.delenv("NODE_DISK", raising=False)
    assert "must be an absolute path on the node; got $NODE_DISK" in settle(source, "$NODE_DISK").cause
    elsewhere.mkdir(mode=0o700)
    mine.symlink_to(elsewhere)
    assert "must be this user's own folder of mode 0700" in settle(source, scratch).cause
    mine.unlink()
    mine.mkdir()
    mine.chmod(0o750)
    assert "must be this user's own folder of mode 0700; got drwxr-x---" in settle(source, scratch).cause
    mine.rmdir()
    for mode in (0o777, 0o770, 0o702):
        scratch.chmod(mode)
        assert "must have the sticky bit where others may write" in settle(source, scratch).cause
    assert not list(scratch.rglob("file-*"))
    scratch.chmod(0o1777)
    monkeypatch.setenv("NODE_DISK", str(scratch))
    assert settle(source, "$NODE_DISK").root.parent == mine


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "", "manifest.json"])
def test_a_manifest_reaches_no_file_outside_its_folder(source: Path, name: str) -> None:
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["files"][0]["name"] = name
    (source / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StagingError, match="must name files within its folder"):
        PackedSet.of(source)
    (source / "manifest.json").write_text("[]")
    with pytest.raises(StagingError, match="must name its files with bytes and sha256"):
        PackedSet.of(source)


def stage(*arguments: object) -> tuple[int, str]:
    line = [sys.executable, "-m", "jobs.stage", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def test_what_is_staged_is_listed_and_freed_unless_it_is_read(source: Path, scratch: Path, tmp_path: Path) -> None:
    other, key = packed(tmp_path / "other", seed=1), set_of(source).key
    settle(other, scratch)
    with Staging(set_of(source), str(scratch)) as reader:
        while not reader.advance():
            pass
        status, said = stage("--list", scratch)
        assert status == 0
        assert sorted(line.split("GB  ")[1] for line in said.splitlines()) == ["complete, in use", "complete, not in use"]
        assert stage("--free", scratch, key) == (1, f"{key} is in use: not removed\n")
        assert_same_files(source, reader.root)
    assert stage("--free", scratch, "0")[0] == 2
    assert stage("--free", scratch, key) == (0, f"{key} removed\n")
    assert not reader.root.exists()
    assert stage("--free", scratch) == (0, f"{set_of(other).key} removed\n")
    assert stage("--list", scratch) == (0, "")
    assert stage("--list", tmp_path / "none")[0] == 2


def test_runs_read_a_staged_set_side_by_side(source: Path, scratch: Path) -> None:
    copy = settle(source, scratch).root
    with Staging(set_of(source), str(scratch)) as first, Staging(set_of(source), str(scratch)) as second:
        assert first.advance(0)
        assert second.advance(0)
        assert first.root == second.root == copy != source


def test_what_is_on_the_node_already_needs_no_room(source: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole copy nothing is missing; of one on its way what it lacks."""
    packed_set, usage = set_of(source), shutil.disk_usage(scratch)
    here = own_folder(str(scratch))

    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=10**6, free=count + 50_000))

    free(packed_set.bytes)
    assert staging.obstacle(packed_set, str(scratch)) == ""
    free(packed_set.bytes - 1)
    assert "do not fit into" in staging.obstacle(packed_set, str(scratch))
    shutil.copytree(source, here / f"{packed_set.key}.partial")
    (here / f"{packed_set.key}.partial" / "file-7").unlink()
    free(BYTES + 7)
    assert staging.obstacle(packed_set, str(scratch)) == ""
    free(BYTES + 6)
    assert "do not fit into" in staging.obstacle(packed_set, str(scratch))
    (here / f"{packed_set.key}.partial").rename(here / packed_set.key)
    shutil.copy(source / "file-7", here / packed_set.key)
    free(-50_000)
    assert staging.obstacle(packed_set, str(scratch)) == ""


def test_a_torn_file_of_a_copier_that_was_killed_does_not_stay(source: Path, scratch: Path) -> None:
    partial = own_folder(str(scratch)) / f"{set_of(source).key}.partial"
    partial.mkdir()
    (partial / "file-9.tmp").write_bytes(b"torn")  # of a file that the set does not hold any more
    assert_same_files(source, settle(source, scratch).root)
