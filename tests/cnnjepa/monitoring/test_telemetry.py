"""TensorBoard over a sweep folder, read by its own readers: hparams with their metrics, statistics, one curve after a resume."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from cnnjepa.batch import Batch
from cnnjepa.config import EncoderConfig, EncoderName, TrainConfig, method_module
from cnnjepa.methods import byol
from cnnjepa.monitoring import telemetry
from cnnjepa.monitoring.recorder import Recorder, hyperparameters
from cnnjepa.monitoring.telemetry import Telemetry, part_of, sampled
from cnnjepa.run.folder import RunFolder, RunResult
from cnnjepa.train import train
from tests.support.tiny import tiny_config


def run(config: TrainConfig, path: Path, **more: Any) -> RunResult | None:
    folder = RunFolder(path)
    folder.prepare(config)
    return train(config, folder, **more)


def reported(**changes: Any) -> TrainConfig:
    config = tiny_config(**changes)
    config.log.tensorboard = True
    return config


def events(path: Path) -> EventAccumulator:
    found = EventAccumulator(str(path / "tensorboard"), {"scalars": 0, "images": 0, "histograms": 0})
    found.Reload()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's: three trials, of two methods, one of which was stopped twice and lost the steps since the first stop."""
    made = tmp_path_factory.mktemp("sweep")
    torch.set_num_threads(1)
    run(reported(), made / "trials" / "a")
    config = reported()
    config.optimizer.lr = 0.001
    other = made / "trials" / "b"
    config.checkpoint.every_minutes = 60
    for stop in (4, 7):
        assert run(config, other, should_stop=lambda stop=stop: len(RunFolder(other).metrics()) >= stop - 1) is None
    newest = sorted((other / "checkpoints").glob("*.pt"))[-1]
    assert "000000007" in newest.name
    newest.unlink()  # the run goes on from step 4, and steps 5 to 7 are recorded twice
    run(config, other)
    run(reported(method=byol.Config(hidden=16, projection=8)), made / "trials" / "c")
    return made


@pytest.mark.xdist_group("trials with TensorBoard")
def test_a_run_that_lost_steps_is_one_curve(folder: Path) -> None:
    assert len(list((folder / "trials" / "b" / "tensorboard").iterdir())) == 3
    disturbed, lines = events(folder / "trials" / "b"), RunFolder(folder / "trials" / "b").metrics()
    losses = [r["loss"] for r in lines if r["kind"] == "step"]
    assert [e.value for e in disturbed.Scalars("step/loss")] == pytest.approx(losses)
    tags = [t for t in disturbed.Tags()["scalars"] if not t.startswith("final/")]
    assert {"gradients/encoder.layer1", "representations/context_std"} <= set(tags)
    for tag in tags:
        assert [e.step for e in disturbed.Scalars(tag)] == list(range(1, 11)), tag
    whole = events(folder / "trials" / "a")
    for kind, tag in (("Images", "masked"), ("Histograms", "gradient_values/predictor")):
        steps = [[e.step for e in getattr(found, kind)(tag)] for found in (disturbed, whole)]
        assert sorted(set(steps[0])) == steps[1] == [1, 5, 10], tag
    assert [e.step for e in disturbed.Scalars("final/linear.test_top1")] == [10]


@pytest.mark.slow
@pytest.mark.xdist_group("trials with TensorBoard")
def test_the_hparams_page_has_each_trial_with_what_differs_and_its_metrics(folder: Path) -> None:
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    assert set(multiplexer.Runs()) == {f"trials/{name}/tensorboard" for name in "abc"}
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(TBContext(multiplexer=multiplexer, data_provider=provider))
    experiment = get_experiment.Handler(RequestContext(), context, "", api_pb2.GetExperimentRequest()).run()
    assert {"optimizer.lr", "method.ema.momentum_start", "method.predictor.depth", "method.hidden"} <= {
        h.name for h in experiment.hparam_infos
    }
    metrics = [m.name for m in experiment.metric_infos]
    assert "final/linear.test_top1" in {m.tag for m in metrics}
    request = api_pb2.ListSessionGroupsRequest(
        slice_size=10,
        allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING],
        col_params=[api_pb2.ColParams(metric=m) for m in metrics],
    )
    groups = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    seen = {}
    for group in groups:
        (session,) = group.sessions
        assert session.status == api_pb2.STATUS_SUCCESS
        values = {v.name.tag: v.value for v in session.metric_values}
        seen[session.name.split("/")[1]] = group.hparams["optimizer.lr"].number_value, values["final/linear.test_top1"]
    assert {name: lr for name, (lr, _) in seen.items()} == {"a": 0.002, "b": 0.001, "c": 0.002}
    for name, (_, score) in seen.items():
        result = RunFolder(folder / "trials" / name).result()
        assert result is not None
        assert score == pytest.approx(result.metrics["linear.test_top1"])


def test_a_run_that_has_not_ended_is_listed_and_has_no_end(tmp_path: Path) -> None:
    run(reported(), tmp_path, should_stop=lambda: True)
    assert set(events(tmp_path).summary_metadata) >= {"_hparams_/session_start_info"}
    assert "_hparams_/session_end_info" not in events(tmp_path).summary_metadata


def test_hyperparameters_are_what_can_change_a_result() -> None:
    config = tiny_config()
    flat = hyperparameters(config)
    assert flat["optimizer.lr"] == 0.002
    assert flat["encoder.name"] == "resnet_small"
    assert flat["encoder.sync_bn"] == "False"
    assert flat["probes.names"] == "['linear', 'knn', 'collapse']"
    assert flat["data.short_side"] == 0  # what came later is there at its default too
    assert not {"threads", "device", "data.workers", "log.every_steps", "warnings.rankme", "probes.at_epochs"} & set(flat)
    assert {type(v) for v in flat.values()} == {str, int, float}


def test_statistics_are_those_of_the_steps_that_are_logged_and_are_made_for_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled: list[str] = []
    honest = Batch.show

    def counted(self: Batch, name: str, features: Any) -> None:
        honest(self, name, lambda: (pooled.append(name), features())[1])

    monkeypatch.setattr(Batch, "show", counted)
    monkeypatch.setattr(telemetry, "sampled", lambda g: pooled.append("histogram") or sampled(g))
    config = reported()
    config.log.every_steps, config.log.images_every_epochs = 4, 0
    run(config, tmp_path)
    assert [e.step for e in events(tmp_path).Scalars("gradients/predictor")] == [4, 8, 10]
    assert pooled == ["context", "target"] * 3  # of one micro-batch of the two each


def test_without_tensorboard_nothing_is_looked_at() -> None:
    config = tiny_config()
    method = method_module("cnn_jepa").Method(config, 10)
    silent = Telemetry(method, wanted=False)
    silent.start_step(logged=True, pictured=True)
    assert silent.shown is None
    silent.see_gradients()
    silent.tell(None, 1)  # type: ignore[arg-type]


@pytest.mark.xdist_group("trials with TensorBoard")
def test_the_norms_of_the_parts_add_up_to_the_whole(folder: Path) -> None:
    found = events(folder / "trials" / "a")
    tags = [t for t in found.Tags()["scalars"] if t.startswith("gradients/")]
    for i, whole in enumerate(found.Scalars("step/gradient_norm")):
        assert sum(found.Scalars(tag)[i].value ** 2 for tag in tags) ** 0.5 == pytest.approx(whole.value, rel=1e-5)


def test_features_of_one_direction_have_no_spread() -> None:
    one = telemetry.feature_statistics("x", torch.ones(8, 16) * torch.arange(1.0, 9.0)[:, None])
    assert one["representations/x_std"].item() == pytest.approx(0.0, abs=1e-6)
    assert one["representations/x_norm"].item() == pytest.approx(4.5 * 4)
    spread = telemetry.feature_statistics("x", torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)))
    assert spread["representations/x_std"].item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("encoder.conv1.weight", "encoder.stem"),
        ("encoder.bn1.bias", "encoder.stem"),
        ("encoder.layer4.2.conv3.weight", "encoder.layer4"),
        ("encoder.stages.3.blocks.0.gamma", "encoder.stages.3"),
        ("encoder.stem.0.weight", "encoder.stem"),
        ("encoder.blocks.11.attn.qkv.weight", "encoder.blocks.11"),
        ("encoder.patch_embed.proj.weight", "encoder.stem"),
        ("predictor.layers.0.weight", "predictor"),
        ("mask_token", "mask_token"),
    ],
)
def test_parts_are_the_stages_of_the_encoder_and_the_other_modules(name: str, part: str) -> None:
    assert part_of(name) == part


def test_a_resnet_50_has_few_parts() -> None:
    config = tiny_config(encoder=EncoderConfig(EncoderName.resnet18))
    config.data.image_size = 96
    parts = {part_of(n) for n, _ in method_module("cnn_jepa").Method(config, 10).named_parameters() if not n.startswith("target")}
    assert parts == {"encoder.stem", *(f"encoder.layer{i}" for i in range(1, 5)), "predictor", "mask_token"}


def test_a_histogram_is_made_of_no_more_than_so_many_values() -> None:
    assert len(sampled([torch.zeros(300_000), torch.zeros(7)])) <= 100_001
    assert len(sampled([torch.zeros(5), torch.zeros(7)])) == 12


def test_pictures_reach_from_black_to_white_and_a_flat_one_is_no_division_by_zero(tmp_path: Path) -> None:
    recorder = Recorder(RunFolder(tmp_path), 0, is_main=False, config=tiny_config())
    seen: list[Any] = []
    recorder._board = SimpleNamespace(tell=lambda *values: seen.append(values), close=lambda: None)  # type: ignore[assignment]
    recorder.pictures(7, {"view": torch.tensor([-2.0, 0.0, 6.0]).view(1, 3, 1, 1), "flat": torch.full((1, 3, 1, 1), 5.0)})
    assert [(call, step, key) for call, step, key, _ in seen] == [("add_images", 7, "view"), ("add_images", 7, "flat")]
    assert [pixels.flatten().tolist() for *_, pixels in seen] == [[0.0, 0.25, 1.0], [0.0, 0.0, 0.0]]
