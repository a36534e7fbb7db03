"""What an attempt writes after it has lost its trial is its own, is not read as the trial's, and removes nothing."""

import json
from pathlib import Path

import pytest
import torch

from cnnjepa.run import checkpoint
from cnnjepa.run.attempts import attempts_with, newest_claim, publish
from cnnjepa.run.folder import RunFolder, RunResult, RunStatus
from cnnjepa.run.saver import Saver
from cnnjepa.train import train
from tests.support.runs import assert_bitwise_equal, comparable, final_state, run
from tests.support.tiny import tiny_config


def claim(run_dir: Path, attempt: int, step: int = 0) -> None:
    """What the owner of an attempt leaves when it begins."""
    (run_dir / "claim").mkdir(parents=True, exist_ok=True)
    (run_dir / "claim" / f"{attempt:06d}.json").write_text(json.dumps({"epoch": attempt, "step": step}))


def save(run_dir: Path, step: int, attempt: int, keep: int = 2) -> checkpoint.Checkpoint:
    return checkpoint.save(run_dir / "checkpoints", step, {"step": step, "by": attempt}, keep, attempt)


def there(run_dir: Path) -> list[tuple[int, int]]:
    return [(c.attempt, c.step) for c in checkpoint.find(run_dir / "checkpoints")]


def test_an_attempt_that_has_lost_its_trial_removes_no_checkpoint_and_comes_last(tmp_path: Path) -> None:
    claim(tmp_path, 1)
    for step in (1, 2, 3):
        save(tmp_path, step, 1)
    assert there(tmp_path) == [(1, 3), (1, 2)]
    claim(tmp_path, 2, step=3)
    save(tmp_path, 4, 1, keep=1)
    assert there(tmp_path) == [(1, 3), (1, 2), (1, 4)], "step 4 was saved too late to count"
    checkpoint.adopt(checkpoint.find(tmp_path / "checkpoints")[0], 2)
    save(tmp_path, 5, 1, keep=1)
    assert there(tmp_path) == [(2, 3), (1, 3), (1, 2), (1, 5), (1, 4)]
    save(tmp_path, 4, 2)
    assert there(tmp_path) == [(2, 4), (2, 3)], "the owner removes what its own replace"
    assert checkpoint.read(checkpoint.find(tmp_path / "checkpoints")[1], torch.device("cpu")) == {"step": 3, "by": 1}


def test_what_came_too_late_is_read_if_nothing_else_is_left(tmp_path: Path) -> None:
    claim(tmp_path, 1)
    claim(tmp_path, 2, step=0)
    save(tmp_path, 7, 1)
    assert there(tmp_path) == [(1, 7)]


def test_an_owner_that_wakes_up_late_begins_with_nothing_of_a_later_attempt(tmp_path: Path) -> None:
    for attempt, step in ((1, 0), (2, 1), (3, 2)):
        claim(tmp_path, attempt, step)
        save(tmp_path, step, attempt, keep=3)
    assert [c.attempt for c in checkpoint.find(tmp_path / "checkpoints", 2)] == [2, 1]


def test_partial_files_of_a_later_attempt_stay(tmp_path: Path) -> None:
    names = {number: f".step-000000001-00000{number}.host.7.tmp" for number in (1, 2, 3)}
    for name in (*names.values(), ".step-000000001.host.7.tmp"):
        (tmp_path / name).touch()
    checkpoint.remove_partial(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == [names[3]]


def test_a_saver_saves_under_its_attempt(tmp_path: Path) -> None:
    saver = Saver(tmp_path / "checkpoints", 3600, 2, attempt=4)
    saver.begin(1, {"step": 1}, lambda: None)
    saver.settle()
    saver.finish(2, {"step": 2}, lambda: None, 1, final=True)
    assert there(tmp_path) == [(4, 2), (4, 1)]


def test_a_result_of_a_claim_that_another_has_followed_is_not_the_trials(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, 1)
    claim(tmp_path, 1)
    assert folder.write_result(RunResult(RunStatus.completed, step=5, claim=1))
    assert folder.result() is not None
    claim(tmp_path, 2)
    assert folder.result() is None
    assert not folder.write_result(RunResult(RunStatus.failed, "it woke up", claim=1))
    assert json.loads((tmp_path / "result.attempt-1.json").read_text())["cause"] == "it woke up"
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "completed"
    assert folder.write_result(RunResult(RunStatus.completed, step=6, claim=2))
    result = folder.result()
    assert result is not None
    assert result.step == 6


def recorded(folder: RunFolder, *steps: int) -> None:
    for step in steps:
        folder.record("step", step, {"epoch": float(step), "by": folder.attempt})


def test_each_attempt_has_its_own_records_and_readers_find_the_newest_ones(tmp_path: Path) -> None:
    reader = RunFolder(tmp_path)
    claim(tmp_path, 1)
    first = RunFolder(tmp_path, 1)
    first.open_metrics(0)
    recorded(first, 1, 2, 3)
    assert reader.metrics() == first.metrics()
    claim(tmp_path, 2, step=2)
    second = RunFolder(tmp_path, 2)
    second.open_metrics(2, 1)
    recorded(second, 3)
    recorded(first, 4, 5)
    first.sync()
    assert [(r["step"], r["by"]) for r in reader.metrics()] == [(1, 1), (2, 1), (3, 2)]
    assert [r["step"] for r in first.metrics()] == [1, 2, 3, 4, 5]
    late = RunFolder(tmp_path, 1)
    late.open_metrics(0)  # it was suspended before it had begun
    recorded(late, 1)
    assert [(r["step"], r["by"]) for r in reader.metrics()] == [(1, 1), (2, 1), (3, 2)]
    assert attempts_with(tmp_path / "metrics.jsonl") == [2, 1]


def test_the_owner_takes_the_name_back_that_a_late_one_has_taken(tmp_path: Path) -> None:
    claim(tmp_path, 1)
    for attempt in (1, 2):
        folder = RunFolder(tmp_path, attempt)
        folder.open_metrics(0)
        recorded(folder, attempt)
    publish(tmp_path / "metrics.jsonl", 1, tmp_path)  # it looked before the claim of 2, and was suspended
    assert [r["by"] for r in RunFolder(tmp_path).metrics()] == [1]
    claim(tmp_path, 2)
    folder.sync()
    assert [r["by"] for r in RunFolder(tmp_path).metrics()] == [2]
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_trainer_without_checkpoints_of_ours_continues_the_newest_records_that_reach_its_step(tmp_path: Path) -> None:
    for attempt, reached in ((1, 9), (2, 4)):
        claim(tmp_path, attempt)
        folder = RunFolder(tmp_path, attempt)
        folder.open_metrics(0)
        recorded(folder, *range(1, reached + 1))
        save(tmp_path, 1, attempt)  # keeps the records
    for step, source in ((9, 1), (4, 2), (30, 2)):
        claim(tmp_path, 3)
        third = RunFolder(tmp_path, 3)
        third.records.unlink(missing_ok=True)
        third.open_metrics(step)
        assert {r["by"] for r in third.metrics()} == {source}
        (tmp_path / "metrics.3.jsonl").unlink()
        publish(tmp_path / "metrics.jsonl", 2, tmp_path)


def test_records_of_an_attempt_stay_as_long_as_a_checkpoint_needs_them(tmp_path: Path) -> None:
    claim(tmp_path, 1)
    for attempt in (1, 2, 3):
        folder = RunFolder(tmp_path, attempt)
        folder.open_metrics(0)
        recorded(folder, 1)
    save(tmp_path, 1, 2)
    claim(tmp_path, 4)
    RunFolder(tmp_path, 4).open_metrics(1, 2)
    assert attempts_with(tmp_path / "metrics.jsonl") == [4, 3, 2]


@pytest.mark.parametrize("name", ["000007.json", "x.json", ".000009.json.host.1.tmp", "000008.released"])
def test_the_newest_claim_is_the_highest_number(name: str, tmp_path: Path) -> None:
    assert newest_claim(tmp_path) == 0
    (tmp_path / "claim").mkdir()
    (tmp_path / "claim" / "000002.json").touch()
    (tmp_path / "claim" / name).touch()
    assert newest_claim(tmp_path) == (7 if name.startswith("000007") else 2)


def test_a_run_that_loses_its_trial_and_goes_on_changes_nothing_for_its_successor(tmp_path: Path) -> None:
    """The first owner stops at step 5 with a checkpoint at 2 alone, and wakes up when the second has died at step 4."""
    config = tiny_config(epochs=2)
    config.checkpoint.every_minutes = 60.0
    run(config, tmp_path / "undisturbed")
    path = tmp_path / "run"
    RunFolder(path).prepare(config)
    claim(path, 1)

    def until(step: int) -> object:
        calls = iter([False] * (step - 1) + [True])
        return lambda: next(calls)

    def train_as(attempt: int, step: int) -> RunResult | None:
        return train(config, RunFolder(path, attempt), until(step), claim=attempt)  # type: ignore[arg-type]

    assert train_as(1, 2) is None
    claim(path, 2, step=2)
    before = {p.name: p.read_bytes() for p in (path / "checkpoints").iterdir()}
    assert train_as(1, 3) is None, "the first owner has lost the trial, and trains on"
    assert before.items() <= {p.name: p.read_bytes() for p in (path / "checkpoints").iterdir()}.items()
    assert train_as(2, 2) is None
    names = {p.name for p in (path / "checkpoints").iterdir()}
    assert train(config, RunFolder(path, 1), claim=1) is None or RunFolder(path).result() is None
    assert names <= {p.name for p in (path / "checkpoints").iterdir()}
    claim(path, 3, step=4)
    result = train(config, RunFolder(path, 3), claim=3)
    assert result is not None
    assert (result.status, result.claim) == (RunStatus.completed, 3)
    assert comparable(path) == comparable(tmp_path / "undisturbed")
    assert_bitwise_equal(final_state(path), final_state(tmp_path / "undisturbed"))


def test_a_run_that_begins_has_the_checkpoint_under_its_own_name(tmp_path: Path) -> None:
    config = tiny_config(epochs=1)
    RunFolder(tmp_path).prepare(config)
    claim(tmp_path, 1)
    train(config, RunFolder(tmp_path, 1), lambda: True, claim=1)
    claim(tmp_path, 2, step=1)
    named: list[tuple[int, int]] = []

    def stop() -> bool:
        named.extend(there(tmp_path))
        return True

    train(config, RunFolder(tmp_path, 2), stop, claim=2)
    assert named[:2] == [(2, 1), (1, 1)]


def test_event_files_carry_the_attempt_and_none_is_opened_after_a_takeover(tmp_path: Path) -> None:
    config = tiny_config(epochs=1)
    config.log.tensorboard = True
    RunFolder(tmp_path).prepare(config)
    claim(tmp_path, 2)
    train(config, RunFolder(tmp_path, 2), lambda: True, claim=2)
    claim(tmp_path, 3, step=1)
    train(config, RunFolder(tmp_path, 2), lambda: True, claim=2)
    assert [p.suffix for p in (tmp_path / "tensorboard").iterdir()] == [".000002"]
