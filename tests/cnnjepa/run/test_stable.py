"""With optimizer.schedule=wsd a longer run begins with the end of a shorter one's stable phase, and is the run that it would have been."""

import sys
from pathlib import Path

import pytest

from cnnjepa import task
from cnnjepa.config import EmaConfig, OptimizerConfig, RateSchedule, Schedule, TrainConfig
from cnnjepa.run import checkpoint, stable
from cnnjepa.run.folder import RunFolder
from cnnjepa.schedules import ema_momentum, learning_rate, stable_steps, weight_decay
from jobs import pretrain
from jobs.config import compose_job
from tests.support.runs import assert_bitwise_equal, comparable, final_state, run
from tests.support.tiny import OVERRIDES, tiny_config


def lasting(epochs: int, **changes: object) -> TrainConfig:
    """5 steps an epoch; the last fifth of the epochs is the decay."""
    config = tiny_config(epochs=epochs, **changes)
    config.optimizer.schedule, config.optimizer.final_weight_decay_fraction = RateSchedule.wsd, 3.0
    config.probes.every_epochs = 1
    return config


def test_the_rate_is_stable_and_decays_at_the_end_and_nothing_before_depends_on_the_length() -> None:
    config = OptimizerConfig(lr=2.0, warmup_epochs=2, final_lr_fraction=0.1, schedule=RateSchedule.wsd, weight_decay=0.1)
    config.final_weight_decay_fraction = 5.0
    assert stable_steps(config, 100) == 80
    rates = [learning_rate(config, step, 5, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert set(rates[10:80]) == {2.0}
    assert rates[84] == pytest.approx(2 * (1 - 0.9 * 0.5))  # a quarter of the decay
    assert rates[99] == pytest.approx(0.2)
    assert rates[79:] == sorted(rates[79:], reverse=True)
    decays = [weight_decay(config, step, 100) for step in range(100)]
    assert len(set(decays[:80])) == 1
    assert decays[0] == pytest.approx(0.1)
    assert decays[99] == pytest.approx(0.5)
    momenta = [ema_momentum(EmaConfig(0.9, 1.0, Schedule.linear), step, 100, config) for step in range(100)]
    assert set(momenta[:80]) == {0.9}
    assert momenta[99] == pytest.approx(1.0)
    for step in range(80):
        assert learning_rate(config, step, 5, 1000) == rates[step]
        assert weight_decay(config, step, 1000) == decays[step]
    assert stable_steps(OptimizerConfig(schedule=RateSchedule.wsd, decay_fraction=0.01), 10) == 9


@pytest.fixture(scope="module")
def shorter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "shorter"
    run(lasting(5), path)
    return path


@pytest.mark.parametrize(("epochs", "longer"), [(5, 8), pytest.param(100, 150, marks=pytest.mark.nightly)])
def test_a_longer_run_that_begins_with_it_is_the_same_bit_for_bit(epochs: int, longer: int, shorter: Path, tmp_path: Path) -> None:
    if epochs != 5:
        run(lasting(epochs), shorter := tmp_path / "shorter")
    found = stable.kept(shorter)
    assert found is not None
    assert found.step == epochs * 4
    folder = RunFolder(tmp_path / "continued")
    folder.prepare(lasting(longer))
    assert stable.begin_with(folder, shorter) == epochs * 4
    result = run(lasting(longer), tmp_path / "continued")
    assert result is not None
    assert result.resumes == 1
    run(lasting(longer), tmp_path / "whole")
    assert comparable(tmp_path / "continued") == comparable(tmp_path / "whole")
    ours, whole = final_state(tmp_path / "continued"), final_state(tmp_path / "whole")
    assert_bitwise_equal({**ours, "resumes": 0}, {**whole, "resumes": 0})
    later = stable.kept(tmp_path / "continued")
    assert later is not None
    assert later.step == longer * 4


def test_a_run_that_was_stopped_just_there_keeps_it_when_it_goes_on(tmp_path: Path) -> None:
    config = lasting(2, seed=7)
    calls = iter([False] * 7 + [True])
    assert run(config, tmp_path / "a", should_stop=lambda: next(calls)) is None
    assert checkpoint.find(tmp_path / "a" / "checkpoints")[0].step == 8 == stable_steps(config.optimizer, 10)
    for file in (tmp_path / "a" / stable.NAME).iterdir():
        file.unlink()
    run(config, tmp_path / "a")
    found = stable.kept(tmp_path / "a")
    assert found is not None
    assert found.step == 8


def test_without_wsd_nothing_is_kept_and_what_has_begun_stays(shorter: Path, tmp_path: Path) -> None:
    run(tiny_config(epochs=1), tmp_path / "plain")
    assert not (tmp_path / "plain" / stable.NAME).exists()
    assert stable.begin_with(RunFolder(tmp_path / "new"), tmp_path / "plain") == 0
    assert stable.begin_with(RunFolder(tmp_path / "plain"), shorter) == 0


@pytest.mark.parametrize(
    ("change", "continues"),
    [({}, True), ({"seed": 1}, False), ({"epochs": 5}, False), ({"epochs": 4}, False), ({"global_batch_size": 16}, False)],
)
def test_only_a_run_that_is_longer_and_else_the_same_continues(change: dict[str, int], continues: bool) -> None:
    assert task.continues(lasting(**{"epochs": 8, **change}), lasting(5)) is continues
    plain = tiny_config(epochs=8)
    assert not task.continues(plain, tiny_config(epochs=5))


def test_like_begins_with_it_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*OVERRIDES, "optimizer.schedule=wsd", "probes.names=[knn]"]
    job = compose_job([*words, "epochs=2", f"run_dir={tmp_path / 'short'}"])
    run(job.train, tmp_path / "short")
    line = ["--like", str(tmp_path / "short"), "epochs=3", f"run_dir={tmp_path / 'long'}"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *line])
    assert pretrain.main() == 0
    assert f"begins with step 8 of {tmp_path / 'short'}, the end of its stable phase" in capsys.readouterr().out
    assert final_state(tmp_path / "long")["resumes"] == 1


def test_a_disk_that_refuses_costs_the_kept_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = checkpoint.save

    def full(folder: Path, *rest: object) -> checkpoint.Checkpoint:
        if folder.name == stable.NAME:
            raise OSError(28, "No space left on device")
        return honest(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save", full)
    assert run(lasting(1), tmp_path / "a") is not None
    assert "the checkpoint at the end of the stable phase, step 4, is not kept: [Errno 28]" in caplog.text
    assert stable.kept(tmp_path / "a") is None
