"""Records, checkpoints and result of a run belong together: what does not match is noticed, and named in one line."""

import itertools
import logging
from pathlib import Path

import pytest

from cnnjepa.run import checkpoint
from cnnjepa.run.consistency import PastTheEndError, disagreement
from cnnjepa.run.folder import RunError, RunFolder, RunResult, RunStatus
from cnnjepa.training_run import Run
from tests.support.runs import assert_bitwise_equal, comparable, final_state, run
from tests.support.tiny import tiny_config


def stopped_at(step: int, path: Path) -> None:
    calls = itertools.count(1)
    assert run(tiny_config(), path, should_stop=lambda: next(calls) >= step) is None


def damage(metrics: Path, how: str, line: int) -> None:
    """Damage the `line`-th line, counted from 1."""
    lines = metrics.read_bytes().splitlines(keepends=True)
    changed = {
        "missing": b"",
        "flipped": lines[line - 1].replace(b'"loss": 1', b'"loss": 2').replace(b'"loss": 0', b'"loss": 1'),
        "torn": lines[line - 1][:40] + b"\n",
    }[how]
    assert changed != lines[line - 1]
    metrics.write_bytes(b"".join([*lines[: line - 1], changed, *lines[line:]]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed")
    run(tiny_config(), path)
    return path


@pytest.mark.parametrize("how", ["missing", "flipped", "torn"])
def test_a_resume_goes_back_to_the_checkpoint_whose_records_are_whole(
    how: str, undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_at(5, tmp_path)
    assert [c.step for c in checkpoint.find(tmp_path / "checkpoints")] == [5, 4]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    damage(tmp_path / "metrics.jsonl", how, len(lines))
    with caplog.at_level(logging.WARNING):
        run(tiny_config(), tmp_path)
    said = "a line differs from what was recorded" if how == "flipped" else "steps 5 to 5 lack 1 records"
    path = tmp_path / "metrics.jsonl"
    lines = f"{path} does not match the checkpoint at step 5: {said}: going back to the checkpoint at step 4, whose records are whole"
    assert [m for m in caplog.messages if "match" in m] == [lines]
    assert comparable(tmp_path) == comparable(undisturbed)
    assert_bitwise_equal(final_state(tmp_path), final_state(undisturbed))


def test_a_resume_without_whole_records_says_what_is_missing_once(
    undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_at(5, tmp_path)
    damage(tmp_path / "metrics.jsonl", "missing", 2)
    with caplog.at_level(logging.WARNING):
        run(tiny_config(), tmp_path, should_stop=lambda: True)
        run(tiny_config(), tmp_path)
    said = "does not match the checkpoint at step 5: steps 2 to 2 lack 1 records, and no other checkpoint has whole records"
    assert [m for m in caplog.messages if "match" in m] == [f"{tmp_path / 'metrics.jsonl'} {said}: the run continues without them"]
    assert_bitwise_equal(final_state(tmp_path), final_state(undisturbed))


def test_a_checkpoint_past_the_end_of_its_run_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Run.state
    without_count = lambda self: {k: v for k, v in known(self).items() if k != "images"}  # noqa: E731, as 0.1 wrote it
    with monkeypatch.context() as patch:
        patch.setattr(Run, "state", without_count)
        stopped_at(5, tmp_path)
    config = tiny_config()
    config.data.train_limit = 64
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(RunError) as raised:
        run(config, tmp_path)
    cause = raised.value.__cause__
    assert isinstance(cause, PastTheEndError)
    newest = checkpoint.find(tmp_path / "checkpoints")[0].path
    assert str(cause).startswith(f"a checkpoint must not be past the run's last step, 4; got step 5 in {newest}")


def test_the_end_of_a_run_is_compared_with_its_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(tmp_path)
    folder.open_metrics(0)
    folder.record("step", 1, {"epoch": 1.0, "loss": 1.5})
    completed = RunResult(RunStatus.completed, metrics={"knn.test_top1": 12.0})
    assert disagreement(folder, completed) == f"{folder.records} does not end with the scores of the result"
    assert disagreement(folder, RunResult(RunStatus.pruned, "late")) == ""
    folder.record("final", 1, {"epoch": 1.0, "knn.test_top1": 12.0})
    assert disagreement(folder, completed) == ""
    assert "scores of the result" in disagreement(folder, RunResult(RunStatus.completed, metrics={"knn.test_top1": 13.0}))
    damage(tmp_path / "metrics.jsonl", "flipped", 1)
    assert disagreement(folder, completed).startswith(f"{folder.records} has changed since it was written")


def test_a_run_whose_records_change_under_it_says_so_at_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls = itertools.count(1)

    def flip() -> bool:
        if next(calls) == 5:
            damage(tmp_path / "metrics.jsonl", "flipped", 2)
        return False

    with caplog.at_level(logging.WARNING):
        assert run(tiny_config(), tmp_path, should_stop=flip) is not None
    assert f"{tmp_path / 'metrics.jsonl'} has changed since it was written: its curves are not those of this run" in caplog.messages
