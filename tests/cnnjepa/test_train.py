"""Training resumes bit for bit after kill -9, stops before it breaks the weights, and falls back over damaged checkpoints."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cnnjepa import train as trainer
from cnnjepa.batch import Batch
from cnnjepa.data.loader import build_plan
from cnnjepa.methods import cnn_jepa
from cnnjepa.run import checkpoint
from cnnjepa.run.folder import RunError, RunFolder, RunStatus
from cnnjepa.run.identity import from_dict, to_dict
from cnnjepa.run.ranks import Ranks
from cnnjepa.train import CollapsedError, NonFiniteError
from cnnjepa.training_run import Run
from tests.support import forked
from tests.support.runs import CHILD, assert_bitwise_equal, comparable, final_state, run, wait_until_held
from tests.support.tiny import tiny_config


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_mid_epoch_and_resume_is_bit_for_bit(tmp_path: Path, workers: int) -> None:
    config = tiny_config()
    config.data.workers = workers
    config.probes.every_epochs = 1
    run(config, tmp_path / "undisturbed")

    disturbed = tmp_path / "disturbed"
    kills = 0
    for wanted in (2, 3, 7):  # steps after which to kill: mid-epoch, and in the second epoch (5 steps each)
        environment = {**os.environ, "HOLD_AT": str(wanted)}
        child = forked.start(["-c", CHILD, str(disturbed), json.dumps(to_dict(config))], env=environment, start_new_session=True)
        wait_until_held(disturbed, [child])
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        kills += 1
    result = run(config, disturbed)
    assert result is not None
    assert result.resumes == kills == 3
    assert comparable(disturbed) == comparable(tmp_path / "undisturbed")
    assert_bitwise_equal(final_state(disturbed), final_state(tmp_path / "undisturbed"))


def test_a_stop_saves_and_the_next_call_goes_on(tmp_path: Path) -> None:
    config = tiny_config()
    config.checkpoint.every_minutes = 60
    calls = iter([False, False, True])
    assert run(config, tmp_path / "a", should_stop=lambda: next(calls)) is None
    assert checkpoint.find(tmp_path / "a" / "checkpoints")[0].step == 3
    assert RunFolder(tmp_path / "a").result() is None
    run(config, tmp_path / "a")
    run(config, tmp_path / "b")
    assert comparable(tmp_path / "a") == comparable(tmp_path / "b")
    assert_bitwise_equal(final_state(tmp_path / "a"), final_state(tmp_path / "b"))


@pytest.mark.slow
def test_a_pruned_run_is_kept_and_goes_on_from_its_checkpoint_when_taken_up(tmp_path: Path) -> None:
    config = tiny_config(epochs=4)
    config.probes.at_epochs = [1, 3]
    run(config, tmp_path / "undisturbed")
    asked: list[tuple[int, bool]] = []

    def judge(epoch: int, metrics: dict[str, float]) -> str:
        asked.append((epoch, "linear.holdout_top1" in metrics))
        return "not among the best" if epoch == 3 else ""

    pruned = run(config, tmp_path / "pruned", judge=judge)
    assert asked == [(1, True), (3, True)]
    assert pruned is not None
    assert (pruned.status, pruned.cause, pruned.step) == (RunStatus.pruned, "not among the best", 15)
    assert pruned.metrics == {}
    assert list(pruned.probes) == ["1", "3"]
    folder = RunFolder(tmp_path / "pruned")
    assert folder.result() == pruned == run(config, folder.path, judge=judge)
    folder.set_aside(RunStatus.failed)
    assert folder.result() == pruned
    folder.set_aside(RunStatus.pruned)
    run(config, folder.path)
    ours, theirs = comparable(folder.path), comparable(tmp_path / "undisturbed")
    assert ours == theirs
    assert_bitwise_equal(final_state(folder.path), final_state(tmp_path / "undisturbed"))


def test_a_run_killed_between_its_last_save_and_the_verdict_is_judged_again(tmp_path: Path) -> None:
    config = tiny_config()
    config.probes.at_epochs = [1]
    assert run(config, tmp_path, should_stop=lambda: len(RunFolder(tmp_path).metrics()) >= 4) is None  # stops after the fifth step
    assert checkpoint.find(tmp_path / "checkpoints")[0].step == 5
    seen: list[dict[str, float]] = []

    def judge(epoch: int, metrics: dict[str, float]) -> str:
        seen.append(metrics)
        return "late" if epoch == 1 else ""

    result = run(config, tmp_path, judge=judge)
    assert result is not None
    assert (result.status, result.cause, result.step) == (RunStatus.pruned, "late", 5)
    assert len(seen) == 1
    assert seen[0] == result.probes["1"]


def test_looks_on_the_way_change_nothing(tmp_path: Path) -> None:
    config = tiny_config()
    plain = run(config, tmp_path / "plain")
    config.probes.at_epochs = [1]
    probed = run(config, tmp_path / "probed")
    assert plain is not None
    assert probed is not None
    assert plain.metrics == probed.metrics
    assert (list(plain.probes), list(probed.probes)) == ([], ["1"])


def test_a_collapsed_run_fails_with_that_cause_at_its_first_probe(tmp_path: Path) -> None:
    config = tiny_config()
    config.probes.at_epochs, config.probes.collapsed_rankme = [1], 1e9
    with pytest.raises(RunError) as raised:
        run(config, tmp_path)
    assert isinstance(raised.value.__cause__, CollapsedError)
    assert re.fullmatch(r"collapsed: collapse\.rankme is [0-9.]+, below 1e\+09, at epoch 1", str(raised.value.__cause__))
    assert raised.value.step == 5
    assert RunFolder(tmp_path).result() is None  # who runs jobs writes it down: jobs/run.py


def test_what_killed_writers_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    config = tiny_config(epochs=1)
    assert run(config, tmp_path, should_stop=lambda: True) is None
    left = tmp_path / "checkpoints" / ".step-000000002-0123456789abcdef.pt.host.1.tmp"
    left.write_bytes(b"half a checkpoint")
    run(config, tmp_path)
    assert not left.exists()


def test_workers_change_nothing(tmp_path: Path) -> None:
    for workers in (0, 2):
        config = tiny_config(epochs=1)
        config.data.workers = workers
        run(config, tmp_path / str(workers))
    assert_bitwise_equal(final_state(tmp_path / "0"), final_state(tmp_path / "2"))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "bit"])
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config()
    calls = iter([False] * 5 + [True])
    assert run(config, tmp_path / "a", should_stop=lambda: next(calls)) is None
    newest = checkpoint.find(tmp_path / "a" / "checkpoints")[0]
    data = bytearray(newest.path.read_bytes())
    data[len(data) // 2] ^= 4
    newest.path.write_bytes(data[:1000] if damage == "truncated" else data)
    run(config, tmp_path / "a")
    assert "is damaged" in caplog.text
    assert "at step 5 of" in caplog.text
    run(config, tmp_path / "b")
    assert comparable(tmp_path / "a") == comparable(tmp_path / "b")


def test_a_finished_run_is_returned_and_not_run_again(tmp_path: Path) -> None:
    config = tiny_config(epochs=1)
    first = run(config, tmp_path / "a")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert run(config, tmp_path / "a", should_stop=lambda: pytest.fail("it trains")) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*") if p.is_file()} == before


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path) -> None:
    run(tiny_config(epochs=1), tmp_path / "a")
    with pytest.raises(ValueError, match=r"run folder must be empty or hold the same configuration; got .*, where seed: 42 -> 1"):
        RunFolder(tmp_path / "a").prepare(tiny_config(epochs=1, seed=1))


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss turns to NaN at step 3 alone; the weights of the last checkpoint are those of step 3 of a healthy run."""
    honest = cnn_jepa.Method.forward

    def poisoned(self: cnn_jepa.Method, batch: object) -> dict:
        out = honest(self, batch)  # type: ignore[arg-type]
        return {**out, "loss": out["loss"] * float("nan")} if batch.step == 3 else out  # type: ignore[attr-defined]

    monkeypatch.setattr(cnn_jepa.Method, "forward", poisoned)
    with pytest.raises(RunError) as caught:
        run(tiny_config(), tmp_path / "a")
    assert isinstance(caught.value.__cause__, NonFiniteError)
    assert "step 3, learning rate 0.00" in str(caught.value.__cause__)
    assert caught.value.step == 3
    monkeypatch.undo()
    calls = iter([False, False, True])
    run(tiny_config(), tmp_path / "b", should_stop=lambda: next(calls))
    assert_bitwise_equal({**final_state(tmp_path / "a"), "resumes": 0}, {**final_state(tmp_path / "b"), "resumes": 0})


def test_a_gradient_that_is_not_finite_stops_too_though_the_loss_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the root is infinite at 0, where its value is 0."""
    honest = cnn_jepa.Method.forward

    def steep(self: cnn_jepa.Method, batch: Batch) -> dict:
        out = honest(self, batch)
        return {**out, "loss": out["loss"] + (0 * self.mask_token.sum()).sqrt()} if batch.step == 2 else out

    monkeypatch.setattr(cnn_jepa.Method, "forward", steep)
    with pytest.raises(RunError) as caught:
        run(tiny_config(epochs=1), tmp_path)
    assert re.match(r"loss 0\.\d+ and gradient norm nan must be finite: step 2, ", str(caught.value.__cause__))
    assert checkpoint.find(tmp_path / "checkpoints")[0].step == 2


def test_a_method_that_draws_random_numbers_draws_the_same_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = cnn_jepa.Method.forward
    drawn: list[float] = []

    def noisy(self: cnn_jepa.Method, batch: Batch) -> dict:
        out, noise = honest(self, batch), torch.rand(())
        drawn.append(float(noise))
        return {**out, "loss": out["loss"] * (1 + noise)}

    monkeypatch.setattr(cnn_jepa.Method, "forward", noisy)
    torch.manual_seed(1)
    run(tiny_config(epochs=1), tmp_path / "a")
    whole = drawn.copy()
    assert len(set(whole)) == 5 * 2, "each step and micro-batch has its own"
    drawn.clear()
    calls = iter([False, False, True])
    assert run(tiny_config(epochs=1), tmp_path / "b", should_stop=lambda: next(calls)) is None
    torch.manual_seed(2)
    run(tiny_config(epochs=1), tmp_path / "b")
    assert drawn == whole
    assert_bitwise_equal(final_state(tmp_path / "a"), final_state(tmp_path / "b"))


def counted_run(device: str, **changes: Any) -> Run:
    """A run of which nothing is there but what is counted: 4 ranks of 3 threads, an hour of work."""
    config = tiny_config(threads=3)
    nothing: Any = None
    ranks = Ranks(0, 4, torch.device(device))
    plan = build_plan(config, 160, 1)
    meter: Any = SimpleNamespace(joules=1.8e6)
    made = Run(config, nothing, ranks, nothing, plan, nothing, nothing, [], nothing, meter, nothing)
    for key, value in {"earlier_seconds": 3540.0, "started": 40.0, **changes}.items():
        setattr(made, key, value)
    return made


def test_hours_kilowatt_hours_and_shares_are_of_all_ranks_in_their_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnjepa.training_run.time", SimpleNamespace(perf_counter=lambda: 100.0))
    on_cpu, on_cuda = counted_run("cpu"), counted_run("cuda")
    assert on_cpu.seconds == 3600
    assert (on_cpu.device_hours, on_cuda.device_hours) == (12, 4)  # core-hours; GPU-hours
    assert on_cuda.energy_kwh == 2
    on_cuda.meter.joules = None  # type: ignore[misc]
    assert on_cuda.energy_kwh is None
    assert counted_run("cpu", training_seconds=80.0, data_wait_seconds=20.0).data_wait_share == 0.25
    assert counted_run("cpu").data_wait_share is None  # nothing was counted


def test_when_a_run_is_probed_recorded_and_pictured() -> None:
    """5 steps an epoch, 4 epochs; every second epoch and the third, and never the last, which is probed anyhow."""
    config = tiny_config(epochs=4)
    config.probes.every_epochs, config.probes.at_epochs = 2, [3, 4]
    config.log.every_steps, config.log.images_every_epochs = 3, 2
    made: Any = SimpleNamespace(config=config, plan=build_plan(config, 160, 1))
    probed = []
    for made.step in range(1, 21):
        probed += [made.step] * trainer.probe_due(made, made.step)
    assert probed == [10, 15]
    assert [s for s in range(1, 21) if trainer.logs_at(made, s)] == [3, 6, 9, 12, 15, 18, 20]
    assert [s for s in range(1, 21) if trainer.pictures_at(made, s)] == [1, 10, 20]
    config.probes.every_epochs, config.probes.at_epochs, config.log.images_every_epochs = 0, [], 0
    assert not any(trainer.pictures_at(made, s) for s in range(1, 21))
    for made.step in range(1, 21):
        assert not trainer.probe_due(made, made.step)


class Ticking:
    """The trainer's clock: each look at it is a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=self.look))

    def look(self) -> float:
        self.now += 1
        return self.now


def test_what_a_run_says_of_its_pace_is_counted_on_its_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at a step's ends and around its 2 batches make 5 s, 2 of them waiting; for the first 8 batches it waits 3 s more each."""
    clock, honest = Ticking(monkeypatch), trainer.train_loader

    def slow_at_first(*arguments: Any, **more: Any) -> Iterator[Any]:
        for number, batch in enumerate(honest(*arguments, **more)):
            clock.now += 3 * (number < 8)
            yield batch

    monkeypatch.setattr(trainer, "train_loader", slow_at_first)
    config = tiny_config()
    config.log.every_steps, config.probes.names = 4, ["collapse"]
    result = run(config, tmp_path)
    assert result is not None
    assert result.images_per_second == 10 * 32 / 74  # 4 steps of 11 s and 6 of 5 s
    assert result.data_wait_share == 44 / 74
    assert [r["data_wait_share"] for r in RunFolder(tmp_path).metrics() if r["kind"] == "step"] == [32 / 44, 8 / 20, 4 / 10]
    method = cnn_jepa.Method(config, 10)
    assert result.parameters == sum(p.numel() for m in (method.encoder, method.predictor) for p in m.parameters()) + 32
    assert result.energy_kwh is None


def test_time_spent_adds_up_over_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same clock: 3 steps, and then 7 in another process, are 50 s in the loop."""
    config = tiny_config()
    config.probes.names = ["collapse"]
    calls, seconds = iter([False, False, True]), []
    for stop in (lambda: next(calls), lambda: False):
        Ticking(monkeypatch)
        run(config, tmp_path, should_stop=stop)
        state = final_state(tmp_path)
        assert state["training_seconds"] == 5 * state["step"]
        assert state["data_wait_seconds"] == 2 * state["step"]
        seconds.append(state["step"])
    assert seconds == [3, 10]


@pytest.mark.slow
def test_bf16_and_fp32_train_alike(tmp_path: Path) -> None:
    losses = {}
    for name in ("fp32", "bf16"):
        config = from_dict({**to_dict(tiny_config()), "precision": name})
        result = run(config, tmp_path / name)
        assert result is not None
        assert result.status is RunStatus.completed
        losses[name] = [r["loss"] for r in RunFolder(tmp_path / name).metrics() if r["kind"] == "step"]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)


def test_the_loss_falls(tmp_path: Path) -> None:
    config = tiny_config(epochs=6)
    run(config, tmp_path)
    losses = [r["loss"] for r in RunFolder(tmp_path).metrics() if r["kind"] == "step"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_tensorboard_has_scalars_and_masked_images_and_one_curve_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config()
    config.log.tensorboard = True
    calls = iter([False, False, False, True])
    run(config, tmp_path, should_stop=lambda: next(calls))
    run(config, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("step/loss")] == list(range(1, 11))
    assert {"step/lr", "step/ema_momentum", "final/linear.test_top1"} <= set(events.Tags()["scalars"])
    assert "masked" in events.Tags()["images"]
