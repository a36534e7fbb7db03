"""TensorBoard's curves go on after a full disk, and lack no number."""

import logging
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cnnjepa.monitoring import recorder
from cnnjepa.monitoring.recorder import _Board
from cnnjepa.run.folder import RunFolder
from tests.support.disk import FullDisk
from tests.support.tiny import tiny_config


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Board:
    """One that asks the disk at each number."""
    monkeypatch.setattr(recorder, "_FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back afterwards
    return _Board(RunFolder(tmp_path), 1, tiny_config())


def tell(board: _Board, first: int, last: int) -> None:
    for step in range(first, last + 1):
        board.tell("add_scalar", step, "step/loss", step / 2)


def let_it_try(board: _Board) -> None:
    """Let it open a new file now, in another second than the last one: TensorBoard reads files in the order of their seconds."""
    time.sleep(1.1)
    board._next = 0.0


def curve(folder: Path) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars("step/loss")]


def whole(last: int) -> list[tuple[int, float]]:
    return [(step, step / 2) for step in range(1, last + 1)]


def test_numbers_that_a_full_disk_refused_are_written_once_it_takes_them(
    board: _Board, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tell(board, 1, 10)
    with FullDisk(500):
        tell(board, 11, 20)
    assert curve(tmp_path) == whole(10)
    let_it_try(board)
    tell(board, 21, 30)
    board.complete()
    board.close()
    assert curve(tmp_path) == whole(30)
    assert "Traceback" not in capfd.readouterr().err


def test_the_last_numbers_are_written_where_only_the_end_finds_room(board: _Board, tmp_path: Path) -> None:
    tell(board, 1, 10)
    with FullDisk(500):
        tell(board, 11, 20)
    let_it_try(board)
    board.close()
    assert curve(tmp_path) == whole(20)


def test_what_is_missing_at_the_end_is_said_in_one_line(board: _Board, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tell(board, 1, 10)
    with FullDisk(500), caplog.at_level(logging.WARNING):
        tell(board, 11, 20)
        board.close()
    assert caplog.messages[-1] == "TensorBoard's curves lack the numbers from step 11 on; metrics.jsonl has them"
    assert curve(tmp_path) == whole(10)


def test_numbers_are_kept_only_until_the_disk_has_them(board: _Board) -> None:
    tell(board, 1, 10)
    assert board._kept == []
    board.close()


def test_other_errors_of_threads_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    board = _Board(RunFolder(tmp_path), 1, tiny_config())

    def fails() -> None:
        raise OSError("of another thread")

    other = threading.Thread(target=fails)
    other.start()
    other.join()
    assert [str(failed.exc_value) for failed in told] == ["of another thread"]
    board.close()
