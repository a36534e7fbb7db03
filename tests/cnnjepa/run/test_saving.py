"""A disk that refuses stops no training and loses no record; a run that must not go on without it fails with what the disk said."""

import errno
import multiprocessing
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cnnjepa.run import checkpoint, refusal, saver
from cnnjepa.run.files import Lines
from cnnjepa.run.folder import RunError, RunFolder
from cnnjepa.run.saver import Saver, host_copy, retry
from tests.support.disk import FullDisk
from tests.support.runs import assert_bitwise_equal, comparable, final_state, run
from tests.support.tiny import tiny_config

LARGE = {"weight": torch.zeros(100_000)}


def nothing() -> None:
    pass


def steps(folder: Path) -> list[int]:
    return [c.step for c in checkpoint.find(folder)]


def test_a_full_disk_leaves_the_old_checkpoints_and_nothing_of_the_new_one(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, LARGE, keep=1)
    with FullDisk(200_000), pytest.raises(OSError, match="File too large"):
        checkpoint.save(tmp_path, 2, LARGE, keep=1)
    assert steps(tmp_path) == [1]
    assert len(list(tmp_path.iterdir())) == 1


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result([*real[:4], 10, *real[5:]]))
    monkeypatch.setattr(torch, "save", lambda *_: pytest.fail("it writes"))
    with pytest.raises(OSError, match=r"No space left on device: 0.00 GB needed, 0.00 GB free"):
        checkpoint.save(tmp_path, 2, LARGE, keep=1)


def test_old_ones_go_only_when_the_new_one_has_been_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, LARGE, keep=2)
    honest = checkpoint._digest_of_file
    monkeypatch.setattr(checkpoint, "_digest_of_file", lambda path: "0" * 16 if path.suffix == ".tmp" else honest(path))
    with pytest.raises(OSError, match="returned other bytes"):
        checkpoint.save(tmp_path, 3, LARGE, keep=2)
    assert steps(tmp_path) == [2, 1]
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_one_does_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, LARGE, keep=2)
    newest = checkpoint.find(tmp_path)[0].path
    newest.write_bytes(newest.read_bytes()[:-1])
    checkpoint._read_back.clear()  # another process
    checkpoint.save(tmp_path, 3, LARGE, keep=2)
    assert steps(tmp_path) == [3, 2, 1]
    checkpoint.save(tmp_path, 4, LARGE, keep=2)
    assert steps(tmp_path) == [4, 3]


def test_what_is_saved_is_the_state_at_its_step_whatever_training_does_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, honest = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a: (go.wait(10), honest(*a))[1])
    weight = torch.ones(1000)
    saver = Saver(tmp_path, 3600, keep=2)
    saver.begin(5, {"weight": weight, "list": [{"moment": weight}]}, nothing)
    assert saver.writing
    weight += 1
    go.set()
    saver.settle()
    state = checkpoint.read(checkpoint.find(tmp_path)[0], torch.device("cpu"))
    assert torch.equal(state["weight"], torch.ones(1000))
    assert torch.equal(state["list"][0]["moment"], torch.ones(1000))


def test_the_loop_waits_for_the_copy_alone_and_a_slow_save_skips_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, honest = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *a: (go.wait(10), honest(*a))[1])
    saver = Saver(tmp_path, 1e-9, keep=2)
    saver.begin(1, LARGE, nothing)
    assert not saver.due()
    go.set()
    saver.settle()
    assert saver.due()


class Clock:
    """`time.monotonic` of the saver, which a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 5000.0
        monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("interval", "retry"), [(600.0, 60.0), (20.0, 20.0)])
def test_a_refused_save_is_said_once_and_tried_again_within_a_minute(
    interval: float, retry: float, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    saver = Saver(tmp_path, interval, keep=2)
    with FullDisk(100_000):
        for _ in range(3):
            saver.begin(1, LARGE, nothing)
            saver.settle()
    assert caplog.text.count("no checkpoint at step 1: ") == 1
    assert f"training continues, next attempt in {retry:.0f} s" in caplog.text
    clock.now += retry - 0.5
    assert not saver.due()
    clock.now += 0.5
    assert saver.due()
    saver.begin(2, LARGE, nothing)
    saver.settle()
    assert steps(tmp_path) == [2]
    clock.now += interval - 0.5
    assert not saver.due(), "after a save that went well the interval begins again"
    clock.now += 0.5
    assert saver.due()


def test_a_refused_save_whose_cause_changes_is_said_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver = Saver(tmp_path, 3600, keep=2)
    for step, cause in ((1, "full"), (2, "full"), (3, "away")):

        def refuses(cause: str = cause) -> None:
            raise OSError(errno.EIO, cause)

        saver.begin(step, LARGE, refuses)
    assert [r.args[0] for r in caplog.records if r.args] == [1, 3]  # type: ignore[index]


def test_the_end_waits_no_longer_than_patience_and_asks_twice_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = Clock(monkeypatch), []

    def refuses() -> None:
        asked.append(clock.now)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        retry(refuses, "the result", 2.0)
    assert asked == [5000.0, 5000.5, 5001.0, 5001.5, 5002.0]


def test_patience_is_a_minute_for_a_stop_and_ten_for_the_end() -> None:
    """Slurm ends a preempted run sooner than that; docs/guides/resuming.md counts on these."""
    assert (saver.PATIENCE_AT_STOP_SECONDS, saver.PATIENCE_AT_END_SECONDS) == (60, 600)


def test_no_checkpoint_is_published_before_what_it_counts_on_is_durable(tmp_path: Path) -> None:
    def refuses() -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    saver = Saver(tmp_path, 3600, keep=2)
    saver.begin(1, LARGE, refuses)
    saver.settle()
    assert steps(tmp_path) == []


@pytest.mark.parametrize("attempt", [0, 3])
def test_the_run_folder_says_why_the_disk_refuses_until_it_takes_a_checkpoint(attempt: int, tmp_path: Path) -> None:
    def refuses() -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    saver = Saver(tmp_path / "checkpoints", 3600, keep=2, attempt=attempt)
    saver.begin(1, LARGE, refuses)
    saver.settle()
    assert refusal.noted(tmp_path, attempt) == "[Errno 30] Read-only file system"
    assert refusal.noted(tmp_path, attempt + 1) == ""
    saver.begin(2, LARGE, nothing)
    saver.settle()
    assert refusal.noted(tmp_path, attempt) == ""


def test_a_disk_without_room_for_the_cause_is_noted_all_the_same(tmp_path: Path) -> None:
    with FullDisk(0):
        refusal.note(tmp_path, 0, OSError(errno.ENOSPC, "No space left on device"))
    assert refusal.noted(tmp_path, 0) == "no space for the cause"


def test_a_run_that_waits_at_its_end_says_so_and_then_no_more(tmp_path: Path) -> None:
    said: list[str] = []
    errors = iter([OSError(errno.ENOSPC, "No space left on device"), None])

    def write() -> None:
        said.append(refusal.noted(tmp_path, 0))
        if (error := next(errors)) is not None:
            raise error

    retry(write, "the result", 30, Saver(tmp_path / "checkpoints", 3600, keep=2).note)
    assert [*said, refusal.noted(tmp_path, 0)] == ["", "[Errno 28] No space left on device", ""]


def test_an_error_that_is_not_the_disks_reaches_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TypeError("a fault of ours")

    monkeypatch.setattr(checkpoint, "save", broken)
    saver = Saver(tmp_path, 3600, keep=2)
    saver.begin(1, LARGE, nothing)
    with pytest.raises(TypeError, match="a fault of ours"):
        saver.settle()


def test_the_final_one_is_kept_beside_the_last_two(tmp_path: Path) -> None:
    config = tiny_config()
    run(config, tmp_path)
    assert steps(tmp_path / "checkpoints") == [10, 9, 8]


def test_retry_waits_for_the_disk_and_gives_up_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    calls = iter([OSError(errno.ENOSPC, "No space left on device"), OSError(errno.ENOSPC, "No space left on device"), None])

    def write() -> str:
        error = next(calls)
        if error:
            raise error
        return "written"

    assert retry(write, "the result", 30) == "written"
    assert caplog.text.count("the result cannot be written: [Errno 28] No space left on device; trying again for up to 30 s") == 1
    with pytest.raises(OSError, match="No space left"):
        retry(lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")), "the result", 0)


def test_lines_wait_for_the_disk_and_none_is_torn_lost_or_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lines"
    path.touch()
    lines = Lines(path)
    expected = [f"line {i}" for i in range(100)]
    for i, line in enumerate(expected):
        with FullDisk(150 if 10 < i < 60 else 10**9):
            lines.add(line)
            if i == 40:
                assert len(path.read_bytes()) <= 150
                with pytest.raises(OSError, match="File too large"):
                    lines.sync()
    lines.sync()
    assert path.read_text().splitlines() == expected
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.slow
@pytest.mark.parametrize("when", ["in the middle", "asked to stop"])
def test_a_disk_that_is_full_for_a_while_changes_nothing(tmp_path: Path, when: str, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(epochs=4)
    config.log.tensorboard = True
    run(config, tmp_path / "undisturbed")
    calls, full = iter(range(1000)), FullDisk(20_000)
    seen: list[int] = []

    def look() -> bool:
        step = next(calls)
        if step == 5:
            full.__enter__()
        if step == 12:
            seen.extend(steps(tmp_path / "disturbed" / "checkpoints"))
            if when == "in the middle":
                full.__exit__()
            else:
                threading.Timer(1.0, full.__exit__).start()
                return True
        return False

    try:
        ended = run(config, tmp_path / "disturbed", should_stop=look)
    finally:
        full.__exit__()
    assert max(seen) <= 6, "the disk was full"
    assert (ended is None) == (when == "asked to stop")
    if ended is None:
        assert steps(tmp_path / "disturbed" / "checkpoints")[0] == 13
        run(config, tmp_path / "disturbed")
    assert "no checkpoint at step" in caplog.text
    assert comparable(tmp_path / "disturbed") == comparable(tmp_path / "undisturbed")
    assert_bitwise_equal(final_state(tmp_path / "disturbed"), final_state(tmp_path / "undisturbed"))


def test_a_run_that_cannot_save_its_end_fails_with_what_the_disk_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnjepa.train.PATIENCE_AT_END_SECONDS", 0.1)
    config = tiny_config(epochs=1)
    folder = RunFolder(tmp_path)
    folder.prepare(config)
    with FullDisk(20_000), pytest.raises(RunError) as raised:
        run(config, tmp_path)
    assert "File too large" in str(raised.value.__cause__)
    assert folder.result() is None
    run(config, tmp_path)
    assert folder.result() is not None


def test_a_result_is_written_when_the_records_are_durable_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses to sync from the last probe on: the run has all it needs for a result, and must not have one."""
    monkeypatch.setattr("cnnjepa.train.PATIENCE_AT_END_SECONDS", 0.1)
    honest = RunFolder.sync

    def refuses(self: RunFolder) -> None:
        if any(r["kind"] == "final" for r in self.metrics()):
            raise OSError(errno.EIO, "Input/output error")
        honest(self)

    monkeypatch.setattr(RunFolder, "sync", refuses)
    with pytest.raises(RunError) as raised:
        run(tiny_config(epochs=1), tmp_path)
    assert "Input/output error" in str(raised.value.__cause__)
    assert any(r["kind"] == "final" for r in RunFolder(tmp_path).metrics())
    assert RunFolder(tmp_path).result() is None
    monkeypatch.undo()
    assert run(tiny_config(epochs=1), tmp_path) is not None


@pytest.mark.slow
def test_a_loader_process_that_is_killed_costs_no_run_and_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(epochs=3)
    config.probes.every_epochs = 1
    run(config, tmp_path / "undisturbed")
    config.data.workers = 2
    killed: list[int] = []
    before = multiprocessing.active_children()  # of other tests; a resource tracker, which may be there too, is none of them

    def kill_one() -> bool:
        if len(killed) < 2 and len(RunFolder(tmp_path / "disturbed").metrics()) >= 3 + 6 * len(killed):
            loaders = [p for p in multiprocessing.active_children() if p not in before]
            assert len(loaders) == 2
            loaders[0].kill()
            assert loaders[0].pid is not None
            killed.append(loaders[0].pid)
        return False

    assert run(config, tmp_path / "disturbed", should_stop=kill_one) is not None
    assert len(killed) == 2
    assert caplog.text.count("a loader process died (") == 2
    assert comparable(tmp_path / "disturbed") == comparable(tmp_path / "undisturbed")


def test_host_copies_share_nothing() -> None:
    state = {"a": torch.ones(3), "b": {"c": [torch.ones(2), 5]}, "d": 1.5}
    copy = host_copy(state)
    state["a"] += 1  # type: ignore[operator]
    assert copy["a"].tolist() == [1, 1, 1]
    assert copy["d"] == 1.5
    assert copy["b"]["c"][1] == 5


@pytest.mark.parametrize(("interval", "again"), [(600.0, 60.0), (20.0, 20.0)])
def test_a_refused_save_is_tried_again_after_a_minute_or_the_interval_where_that_is_shorter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interval: float, again: float
) -> None:
    def refuses() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    now = [0.0]
    monkeypatch.setattr(saver.time, "monotonic", lambda: now[0])
    made = Saver(tmp_path, interval, keep=2)
    now[0] = interval
    assert made.due()
    made.begin(1, LARGE, refuses)
    now[0] += again - 0.5
    assert not made.due()
    now[0] += 0.5
    assert made.due()
