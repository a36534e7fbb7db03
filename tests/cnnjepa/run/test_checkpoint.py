import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cnnjepa.run import checkpoint

CPU = torch.device("cpu")


def saved(folder: Path, steps: int) -> list[checkpoint.Checkpoint]:
    return [checkpoint.save(folder, s, {"step": s, "weight": torch.full((50,), float(s))}, keep=3) for s in range(steps)]


def test_the_newest_few_are_kept_and_read_back(tmp_path: Path) -> None:
    saved(tmp_path, 6)
    assert [c.step for c in checkpoint.find(tmp_path)] == [5, 4, 3]
    newest = checkpoint.newest_good(tmp_path)
    assert newest is not None
    state = checkpoint.read(newest, CPU)
    assert state["step"] == 5
    assert torch.equal(state["weight"], torch.full((50,), 5.0))
    assert torch.load(newest.path, weights_only=True)["step"] == 5
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["truncated", "bit", "empty"])
def test_a_damaged_newest_file_is_passed_over_loudly(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    newest = saved(tmp_path, 3)[-1]
    data = bytearray(newest.path.read_bytes())
    data[len(data) // 2] ^= 1
    newest.path.write_bytes({"truncated": bytes(data[:-100]), "bit": bytes(data), "empty": b""}[damage])
    with pytest.raises(ValueError, match="do not match the checksum"):
        checkpoint.read(newest, CPU)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.newest_good(tmp_path, set_aside=True)
    assert found is not None
    assert found.step == 1
    assert "is damaged (checksum differs): using the one before it" in caplog.text
    assert [p.suffix for p in tmp_path.glob("*.damaged")] == [".damaged"]


def test_when_all_are_damaged_it_says_that_the_run_starts_from_the_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for each in saved(tmp_path, 2):
        each.path.write_bytes(b"")
    assert checkpoint.newest_good(tmp_path) is None
    assert "starting from the beginning" in caplog.text
    assert not list(tmp_path.glob("*.damaged"))


def test_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.newest_good(tmp_path / "none") is None


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("run",)

    bad = checkpoint.save(tmp_path, 1, {"step": Evil()}, keep=2)
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoint.read(bad, CPU)


def test_room_is_what_an_ordinary_user_may_fill_and_exactly_enough_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free blocks that are reserved for root are no room; sizes of blocks are those of the fragments that are counted."""
    reported = SimpleNamespace(f_bsize=1 << 20, f_frsize=4096, f_blocks=10**6, f_bfree=10**6, f_bavail=5)
    monkeypatch.setattr(os, "statvfs", lambda _: reported)
    checkpoint.require_room(tmp_path, 5 * 4096)
    with pytest.raises(OSError, match=r"0\.00 GB needed, 0\.00 GB free") as caught:
        checkpoint.require_room(tmp_path, 5 * 4096 + 1)
    assert caught.value.errno == errno.ENOSPC
    reported.f_bavail = 3 * 10**9 // 4096
    with pytest.raises(OSError, match=r"4\.50 GB needed, 3\.00 GB free"):
        checkpoint.require_room(tmp_path, 4_500_000_000)


def test_the_size_of_a_state_is_that_of_all_its_tensors() -> None:
    state = {"step": 3, "method": {"a": torch.zeros(10, dtype=torch.float64)}, "optimizer": {"state": {0: {"m": torch.zeros(5)}}}}
    assert checkpoint.nbytes(state) == 80 + 20
