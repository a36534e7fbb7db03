"""Two sweeps on one machine: each says what the other holds."""

import os
from pathlib import Path

import pytest

from sweeps.execution import ray_tune
from sweeps.execution.ray_local import LocalEngine
from sweeps.execution.ray_tune import Held, held_by_others, hold

NOBODY = 2**22 + 1  # above the largest PID


def folder(path: Path, pid: int, held: Held | None) -> Path:
    made = path / f"cnnjepa-{pid}-x{len(list(path.iterdir()))}"
    made.mkdir()
    if held is not None:
        hold(made, held)
    return made


def test_what_living_sweeps_hold_is_counted_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_tune, "_TEMPORARY", tmp_path)
    mine = folder(tmp_path, os.getpid(), Held("/runs/mine", 1, 0.0))
    assert held_by_others(mine) == []
    other = folder(tmp_path, os.getppid(), Held("/runs/other", 2, 0.0))
    folder(tmp_path, NOBODY, Held("/runs/dead", 2, 0.0))
    folder(tmp_path, os.getppid(), None)  # it begins
    damaged = folder(tmp_path, os.getppid(), None)
    for text in ("{", "[]", '{"sweep": 1, "cores": 2, "gpus": 0.0}'):
        (damaged / "held.json").write_text(text)
        assert held_by_others(mine) == [Held("/runs/other", 2, 0.0)]
    assert held_by_others(other) == [Held("/runs/mine", 1, 0.0)]


def test_a_sweep_says_that_it_does_not_leave_out_what_others_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_tune, "_TEMPORARY", tmp_path)
    engine = LocalEngine.__new__(LocalEngine)
    engine.cores, engine._private = 2, folder(tmp_path, os.getpid(), None)
    assert engine.shared_line() == ""
    folder(tmp_path, os.getppid(), Held("/runs/other", 2, 0.0))
    line = engine.shared_line()
    assert line.startswith("other sweeps run on this machine: /runs/other holds 2 of its 2 cores, which this one does not leave to them;")
    assert "cluster.max_parallel=N" in line
