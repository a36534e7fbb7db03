"""A step's numbers are read one step late on a GPU; here the trainer does so on the CPU, and nothing that is kept differs."""

from pathlib import Path

import pytest
import torch

from cnnjepa import train as trainer
from cnnjepa.config import TrainConfig
from cnnjepa.data.loader import MicroBatches
from cnnjepa.methods import cnn_jepa
from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunError, RunFolder
from cnnjepa.train import NonFiniteError
from cnnjepa.verdict import Numbers, Seen, Verdicts, reads_late
from tests.support.runs import assert_bitwise_equal, comparable, final_state, run
from tests.support.tiny import tiny_config


def seldom() -> TrainConfig:
    """10 steps, recorded at 4, 8 and 10, probed after 5; no checkpoint comes due."""
    config = tiny_config()
    config.log.every_steps, config.log.images_every_epochs = 4, 0
    config.checkpoint.every_minutes, config.probes.every_epochs = 60, 1
    return config


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Read late; return the step whose numbers were read, and the steps that had been queued by then, for each reading."""
    found, queued = [], [0]
    honest, made = Numbers.read, Numbers.__init__

    def noted(self: Numbers) -> Seen:
        found.append((self.step, queued[-1]))
        return honest(self)

    def counted(self: Numbers, values: torch.Tensor, step: int, lr: float) -> None:
        queued.append(step)
        made(self, values, step, lr)

    monkeypatch.setattr(Numbers, "read", noted)
    monkeypatch.setattr(Numbers, "__init__", counted)
    monkeypatch.setattr(trainer, "reads_late", lambda device: True)
    return found


def test_only_a_gpu_is_read_late() -> None:
    assert not reads_late(torch.device("cpu"))
    assert reads_late(torch.device("cuda"))


def test_a_run_is_the_same_and_each_step_is_read_once_before_it_is_recorded(
    tmp_path: Path, read: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(seldom(), tmp_path / "late")
    # Steps 3, 7 and 9 are recorded and step 4 is probed, counted from 0: these are read at once.
    assert read == [(0, 1), (1, 2), (2, 3), (3, 3), (4, 4), (5, 6), (6, 7), (7, 7), (8, 9), (9, 9)]
    monkeypatch.setattr(trainer, "reads_late", lambda device: False)
    run(seldom(), tmp_path / "at once")
    assert comparable(tmp_path / "late") == comparable(tmp_path / "at once")
    assert_bitwise_equal(final_state(tmp_path / "late"), final_state(tmp_path / "at once"))


@pytest.mark.parametrize("bad", [1, 2, 3, 4, 6])
def test_what_a_bad_loss_has_touched_is_neither_recorded_nor_saved_nor_probed(
    bad: int, tmp_path: Path, read: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = cnn_jepa.Method.forward

    def poisoned(self: cnn_jepa.Method, batch: object) -> dict:
        out = honest(self, batch)  # type: ignore[arg-type]
        return {**out, "loss": out["loss"] * float("nan")} if batch.step == bad else out  # type: ignore[attr-defined]

    monkeypatch.setattr(cnn_jepa.Method, "forward", poisoned)
    with pytest.raises(RunError) as caught:
        run(seldom(), tmp_path)
    assert isinstance(caught.value.__cause__, NonFiniteError)
    assert f"must be finite: step {bad}, learning rate 0.00" in str(caught.value.__cause__)
    assert caught.value.step == bad
    assert [c.step for c in checkpoint.find(tmp_path / "checkpoints")] == [0]
    assert all(record["step"] <= bad for record in RunFolder(tmp_path).metrics())


def test_checkpoints_that_are_due_hold_the_steps_that_were_read(tmp_path: Path, read: list[tuple[int, int]]) -> None:
    """With an interval of 0 one is always due. A step that is read for it leaves nothing unread, so that the next may be read late."""
    config = seldom()
    config.checkpoint.every_minutes, config.checkpoint.keep = 0, 20
    run(config, tmp_path)
    assert sorted(c.step for c in checkpoint.find(tmp_path / "checkpoints")) == [0, 2, 4, 5, 7, 8, 10]


def test_a_stop_comes_a_step_later_and_the_run_goes_on_bit_for_bit(tmp_path: Path, read: list[tuple[int, int]]) -> None:
    calls = iter([False, True, False])
    assert run(seldom(), tmp_path / "a", should_stop=lambda: next(calls)) is None
    assert checkpoint.find(tmp_path / "a" / "checkpoints")[0].step == 3
    run(seldom(), tmp_path / "a")
    run(seldom(), tmp_path / "b")
    assert comparable(tmp_path / "a") == comparable(tmp_path / "b")
    assert_bitwise_equal(final_state(tmp_path / "a"), final_state(tmp_path / "b"))


def test_a_loader_that_fails_ends_the_run_before_its_black_images_are_saved(
    tmp_path: Path, read: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`failed` is what a rank of several tells the others; here the only rank says it at step 1."""
    asked = []

    def failed(self: MicroBatches) -> bool:
        asked.append(1)
        return len(asked) > 1

    def raise_fault(self: MicroBatches) -> None:
        raise OSError("the images are gone")

    monkeypatch.setattr(MicroBatches, "failed", property(failed))
    monkeypatch.setattr(MicroBatches, "raise_fault", raise_fault)
    with pytest.raises(RunError, match="the images are gone") as caught:
        run(seldom(), tmp_path)
    assert caught.value.step == 1
    assert [c.step for c in checkpoint.find(tmp_path / "checkpoints")] == [0]


def test_a_wish_is_answered_in_the_next_step_and_once() -> None:
    def numbers(step: int, stop: float = 0.0, save: float = 0.0) -> Numbers:
        return Numbers(torch.tensor([1.0, 0.5, stop, save, 0.0, 2.0]), step, 0.1)

    verdicts = Verdicts(Numbers.read, late=True)
    assert verdicts.of(numbers(0, save=0.25), now=False) is None
    assert verdicts.of(numbers(1), now=False) == Seen(1.0, 0.5, 0.0, 0.25, 0.0, 2.0)
    assert verdicts.of(numbers(2), now=False) is None
    assert verdicts.of(numbers(3, stop=0.5), now=False) is None
    assert verdicts.of(numbers(4), now=False) == Seen(1.0, 0.5, 0.5, 0.0, 0.0, 2.0)
    at_once = Verdicts(Numbers.read, late=False)
    assert at_once.of(numbers(0, stop=1.0), now=False) == Seen(1.0, 0.5, 1.0, 0.0, 0.0, 2.0)
