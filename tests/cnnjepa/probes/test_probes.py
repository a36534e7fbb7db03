from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from cnnjepa import task
from cnnjepa.data import loader
from cnnjepa.data.datasets import GreyImages, Splits, load_splits
from cnnjepa.data_config import DataConfig
from cnnjepa.models.resnet import build_encoder
from cnnjepa.probe_config import ProbeConfig
from cnnjepa.probes import collapse, features, knn, linear, run_probes
from cnnjepa.probes.features import Features, ProbeData, calibrate_batchnorm, pooled_features, topk_accuracy
from cnnjepa.randomness import Stream, integer
from cnnjepa.run.folder import RunFolder, RunStatus
from cnnjepa.run.identity import to_dict
from cnnjepa.run.ranks import Ranks
from cnnjepa.train import train
from tests.support.runs import assert_bitwise_equal, final_state, run
from tests.support.tiny import tiny_config

ALONE = Ranks(0, 1, torch.device("cpu"))


def blobs(n: int, seed: int, classes: int = 3, spread: float = 0.3) -> Features:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=random)
    return Features(torch.eye(8)[labels] + spread * torch.randn(n, 8, generator=random), labels)


def probe_data(final: bool = True, **probes: object) -> ProbeData:
    config = tiny_config(probes=ProbeConfig(**{"feature_batch_size": 32, "linear_paper_lr": 0.05, "linear_paper_epochs": 30, **probes}))  # type: ignore[arg-type]
    return ProbeData(blobs(200, 0), blobs(100, 1), blobs(100, 2) if final else None, 3, config)


def test_knn_votes_are_sklearns() -> None:
    data = probe_data()
    theirs = KNeighborsClassifier(20, weights=lambda d: np.exp((1 - d) / 0.1), metric="cosine")
    theirs.fit(data.fit.features_NC.double().numpy(), data.fit.labels_N.numpy())
    votes = knn.knn_scores(data.fit.features_NC.double(), data.fit.labels_N, data.holdout.features_NC.double(), 3, 20, 0.1)
    expected = theirs.predict_proba(data.holdout.features_NC.double().numpy())
    np.testing.assert_allclose((votes / votes.sum(1, keepdim=True)).numpy(), expected, rtol=1e-6, atol=1e-9)


def test_a_small_temperature_makes_the_nearest_neighbour_decide_and_not_class_0() -> None:
    bank, query = torch.tensor([[1.0, 0.2], [0.2, 1.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    votes = knn.knn_scores(bank, torch.tensor([2, 1]), query, 3, 2, 1e-4)
    assert votes.argmax(1).tolist() == [2, 1]
    assert votes.sum() > 0


def test_k_is_clipped_to_the_bank() -> None:
    assert knn.run(probe_data(knn_k=10_000))["holdout_top1"] > 50


def test_the_knn_probe_takes_its_k_and_temperature_from_the_configuration() -> None:
    data = probe_data(knn_k=7, knn_temperature=0.6)
    data.fit, data.holdout = blobs(200, 0, spread=1.2), blobs(100, 1, spread=1.2)
    theirs = KNeighborsClassifier(7, weights=lambda d: np.exp((1 - d) / 0.6), metric="cosine")
    theirs.fit(data.fit.features_NC.numpy(), data.fit.labels_N.numpy())
    right = theirs.predict(data.holdout.features_NC.numpy()) == data.holdout.labels_N.numpy()
    scores = {}
    for k, temperature in ((7, 0.6), (200, 0.6), (7, 0.01)):
        data.config.probes.knn_k, data.config.probes.knn_temperature = k, temperature
        scores[k, temperature] = knn.run(data)["holdout_top1"]
    assert scores[7, 0.6] == pytest.approx(100 * right.mean())
    assert scores[7, 0.6] not in (scores[200, 0.6], scores[7, 0.01]), "both settings are of consequence here"


def test_linear_learns_what_is_separable_and_chance_what_is_not() -> None:
    assert linear.run(probe_data())["test_top1"] > 95
    shuffled = probe_data()
    shuffled.fit.labels_N = shuffled.fit.labels_N[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert linear.run(shuffled)["test_top1"] < 70


def test_the_paper_protocol_is_adam_on_all_training_labels_in_fixed_batches_and_its_best_epoch() -> None:
    """Its weights once more, by Adam's formula."""
    data = probe_data(linear_paper_epochs=6, linear_paper_lr=0.5, linear_paper_batch_size=32)
    data.fit, data.holdout, data.test = (blobs(n, seed, spread=1.0) for n, seed in ((200, 0), (100, 1), (100, 2)))
    random = torch.Generator().manual_seed(integer(data.config.seed, Stream.probe))
    weight = ((torch.rand(3, 8, generator=random) * 2 - 1) / 8**0.5).requires_grad_()
    bias = torch.zeros(3, requires_grad=True)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in (weight, bias)]
    images, labels = torch.cat([data.fit.features_NC, data.holdout.features_NC]), torch.cat([data.fit.labels_N, data.holdout.labels_N])
    batches, count, scores = torch.randperm(300, generator=random).split(32), 0, []
    for _ in range(6):
        for chosen in batches:
            guess = images[chosen] @ weight.T + bias
            loss = -guess.log_softmax(1)[torch.arange(len(chosen)), labels[chosen]].mean()
            gradients, count = torch.autograd.grad(loss, (weight, bias)), count + 1
            with torch.no_grad():
                for parameter, gradient, (first, second) in zip((weight, bias), gradients, moments, strict=True):
                    first.mul_(0.9).add_(gradient, alpha=0.1)
                    second.mul_(0.999).add_(gradient**2, alpha=0.001)
                    parameter -= 0.5 * (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
        right = (data.test.features_NC @ weight.T + bias).argmax(1) == data.test.labels_N
        scores.append(100 * right.double().mean().item())
    assert max(scores) != scores[-1], "best and last epoch differ"
    assert linear.run(data)["paper_protocol_top1"] == pytest.approx(max(scores))


def test_the_paper_protocol_decides_nothing() -> None:
    first, second = (
        linear.run(probe_data(linear_paper_epochs=n, linear_paper_lr=r, linear_paper_batch_size=b))
        for n, r, b in ((1, 1e-3, 512), (5, 1.0, 7))
    )
    assert first.pop("paper_protocol_top1") != second.pop("paper_protocol_top1")
    assert first == second


def test_scores_say_on_how_many_images_they_rest(tmp_path: Path) -> None:
    result = run(tiny_config(epochs=1), tmp_path)
    assert result is not None
    assert result.images["linear.holdout_top1"] == result.images["knn.holdout_top5"] == 32
    assert result.images["linear.test_top5"] == result.images["linear.paper_protocol_top1"] == 60
    assert set(result.images) == {m for m in result.metrics if "_top" in m}
    assert RunFolder(tmp_path).result() == result
    assert task.sampling_error(90.0, 287) == pytest.approx(1.77, abs=0.005)  # sqrt(0.9 x 0.1 / 287)


def test_test_images_are_not_read_before_the_end() -> None:
    metrics = {**linear.run(probe_data(final=False)), **knn.run(probe_data(final=False))}
    assert {k.split("_")[0] for k in metrics if "_top" in k} == {"holdout"}


class _Means(nn.Module):
    """Features that are known: the mean of each channel."""

    out_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW


class _Unreadable:
    """Images that nobody may look at."""

    labels = np.zeros(0, np.int64)

    def pictures(self, _indices: list[int]) -> list:
        raise AssertionError("a test image is read")


def test_each_part_has_the_features_and_labels_of_its_own_images() -> None:
    config = tiny_config()
    splits = load_splits(config.data)
    data = features.probe_data(_Means(), config, splits, ALONE, final=True)
    assert data is not None
    assert data.test is not None
    mean, std = splits.dataset.mean[0], splits.dataset.std[0]
    for part, images, indices in (
        (data.fit, splits.dataset.train, splits.fit),
        (data.holdout, splits.dataset.train, splits.holdout),
        (data.test, splits.dataset.test, splits.test),
    ):
        assert np.array_equal(part.labels_N.numpy(), images.labels[indices])
        shown = [loader.probe_view(config.data, p).double() for p in images.pictures(indices.tolist())]
        expected = torch.stack([(pixels.mean((1, 2)) / 255 - mean) / std for pixels in shown])
        torch.testing.assert_close(part.features_NC.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_look_on_the_way_opens_no_test_image() -> None:
    config = tiny_config()
    splits = load_splits(config.data)
    splits.dataset.test = _Unreadable()  # type: ignore[assignment]
    data = features.probe_data(_Means(), config, splits, ALONE, final=False)
    assert data is not None
    assert data.test is None
    with pytest.raises(features.FeatureError, match="a test image is read"):
        features.probe_data(_Means(), config, splits, ALONE, final=True)


def test_a_run_opens_its_test_images_once_after_its_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    config.probes.every_epochs, config.probes.names = 1, ["knn"]
    opened: list[int] = []

    class Watched(GreyImages):
        def pictures(self, indices: list[int]) -> list:
            opened.extend(indices)
            return super().pictures(indices)

    def splits_of(data: DataConfig) -> Splits:
        splits = load_splits(data)
        test = splits.dataset.test
        assert isinstance(test, GreyImages)
        splits.dataset.test = Watched(test.pixels, test.labels)
        return splits

    def judge(epoch: int, metrics: dict[str, float]) -> str:
        assert (epoch, opened) == (1, [])
        assert "knn.holdout_top1" in metrics
        assert not [k for k in metrics if "test" in k or "paper" in k]
        return ""

    monkeypatch.setattr("cnnjepa.training_run.load_splits", splits_of)
    result = run(config, tmp_path, judge=judge)
    assert result is not None
    assert "knn.test_top1" in result.metrics
    assert opened == splits_of(config.data).test.tolist()


def test_top5_only_where_classes_allow() -> None:
    scores = torch.eye(6)
    assert set(topk_accuracy(scores, torch.arange(6), 6)) == {"top1", "top5"}
    assert topk_accuracy(torch.eye(3), torch.tensor([0, 1, 0]), 3) == {"top1": pytest.approx(200 / 3)}
    assert set(topk_accuracy(torch.eye(5), torch.arange(5), 5)) == {"top1"}, "of 5 classes all are among the best 5"
    ranked = torch.arange(7.0).flip(0).expand(7, 7)  # class k comes k-th for each image
    assert topk_accuracy(ranked, torch.arange(7), 7) == {"top1": pytest.approx(100 / 7), "top5": pytest.approx(500 / 7)}


def test_collapse_figures_tell_a_collapsed_from_a_spread_representation() -> None:
    data = probe_data()
    random = torch.Generator().manual_seed(0)
    data.holdout.features_NC = torch.randn(500, 8, generator=random)
    spread = collapse.run(data)
    assert spread["rankme"] > 7.5
    assert spread["feature_std"] == pytest.approx(1, abs=0.05)
    data.holdout.features_NC = torch.ones(500, 8) + 1e-4 * torch.randn(500, 8, generator=random)
    collapsed = collapse.run(data)
    assert collapsed["rankme"] < 1.1
    assert collapsed["feature_std"] < 1e-3
    data.holdout.features_NC = torch.diag(torch.tensor([3.0, 3.0, 1.0]))  # shares of 3/7, 3/7 and 1/7
    assert collapse.run(data)["rankme"] == pytest.approx(np.exp(-(6 / 7 * np.log(3 / 7) + 1 / 7 * np.log(1 / 7))), rel=1e-5)
    assert collapse.run(data)["feature_std"] == pytest.approx(1.0)  # of 1, 0 and 0: the root of a third, times the root of 3
    data.holdout.features_NC = torch.zeros(500, 8)
    assert collapse.run(data) == {"feature_std": 0.0}


def test_collapsed_is_what_falls_below_a_limit_and_what_was_not_probed_is_not() -> None:
    probes = tiny_config().probes
    assert collapse.collapsed({"collapse.feature_std": 0.2, "collapse.rankme": 9.0}, probes) == ""
    assert collapse.collapsed({}, probes) == ""
    assert collapse.collapsed({"collapse.feature_std": 0.01, "collapse.rankme": 1.2}, probes) == "", "a limit itself is not below it"
    assert collapse.collapsed({"collapse.feature_std": 0.001}, probes) == "collapse.feature_std is 0.001, below 0.01"
    assert collapse.collapsed({"collapse.feature_std": 0.2, "collapse.rankme": 1.1}, probes) == "collapse.rankme is 1.1, below 1.2"


def test_a_failing_probe_is_a_missing_value_with_its_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_data: object) -> dict:
        raise RuntimeError("no room on device")

    monkeypatch.setattr(knn, "run", broken)
    monkeypatch.setattr(collapse, "run", lambda _data: {"rankme": float("nan")})
    folder = RunFolder(tmp_path)
    config = tiny_config(epochs=1)
    folder.prepare(config)
    result = train(config, folder)
    assert result is not None
    assert result == folder.result()
    assert result.status is RunStatus.completed
    assert result.missing == {"knn": "RuntimeError: no room on device", "collapse": "ValueError: rankme is not finite"}
    assert not [k for k in result.metrics if k.startswith(("knn", "collapse"))]
    assert "linear.test_top1" in result.metrics


def test_a_feature_pass_that_fails_leaves_every_probe_without_value_and_the_run_completed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def undecodable(*_: object) -> None:
        raise OSError("image file is truncated")

    monkeypatch.setattr(loader, "probe_view", undecodable)
    folder, config = RunFolder(tmp_path), tiny_config(epochs=1)
    folder.prepare(config)
    result = train(config, folder)
    assert result is not None
    assert result.status is RunStatus.completed
    assert result.metrics == {}
    assert set(result.missing.values()) == {"OSError: image file is truncated"}
    assert set(result.missing) == {"linear", "knn", "collapse"}


@pytest.mark.slow
def test_a_feature_pass_that_fails_on_the_way_changes_no_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tiny_config()
    config.probes.every_epochs = 1
    run(config, tmp_path / "whole")
    honest, calls = features.normalise, iter(range(10**6))

    def fails_at_first(*values: object) -> torch.Tensor:
        if next(calls) == 0:
            raise OSError("image file is truncated")
        return honest(*values)  # type: ignore[arg-type]

    monkeypatch.setattr(features, "normalise", fails_at_first)
    run(config, tmp_path / "failed")
    assert RunFolder(tmp_path / "failed").probes() != RunFolder(tmp_path / "whole").probes()
    assert_bitwise_equal(final_state(tmp_path / "failed"), final_state(tmp_path / "whole"))


def test_features_that_are_not_finite_are_no_value() -> None:
    data = probe_data()
    data.fit.features_NC[3, 3] = float("inf")
    for probe in (linear, knn):
        with pytest.raises(ValueError, match="not finite"):
            probe.run(data)
    for part in ("holdout", "test"):
        data = probe_data()
        getattr(data, part).features_NC[0, 0] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            linear.run(data)


def test_features_are_those_of_the_frozen_encoder_and_leave_it_unchanged() -> None:
    config = tiny_config()
    splits = load_splits(config.data)
    encoder = build_encoder(config.encoder, 0).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    features = pooled_features(encoder, config, splits, splits.dataset.test, splits.test, ALONE)
    assert features.shape == (60, 32)
    assert encoder.training
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert run_probes(encoder, config, splits, ALONE, final=True).missing == {}


def test_calibration_makes_features_of_a_random_encoder_normal() -> None:
    config = tiny_config()
    splits = load_splits(config.data)
    encoder = build_encoder(config.encoder, 0)
    calibrate_batchnorm(encoder, config, splits, ALONE)
    hooked = []
    encoder.bn1.register_forward_hook(lambda _m, _i, out: hooked.append(out.clone()))  # a ReLU writes over it
    pooled_features(encoder, config, splits, splits.dataset.train, splits.pretrain, ALONE)
    values = torch.cat([h.permute(1, 0, 2, 3).flatten(1) for h in hooked], 1)
    assert values.mean(1).abs().max() < 0.05
    assert (values.std(1) - 1).abs().max() < 0.05
    assert encoder.bn1.momentum == 0.1
    # The plain average over the batches of all training images, those whose labels are held out among them.
    images = torch.stack([loader.probe_view(config.data, p) for p in splits.dataset.train.pictures(splits.pretrain.tolist())])
    maps = [encoder.conv1(loader.normalise(part, splits, ALONE.device, torch.float32)) for part in images.split(256)]
    mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    torch.testing.assert_close(encoder.bn1.running_mean, mean.detach(), rtol=1e-4, atol=1e-5)


def test_each_probe_gives_the_metrics_that_it_declares() -> None:
    """A sweep's objective is compared with these before anything is trained."""
    many = [blobs(n, seed, classes=7) for seed, n in enumerate((200, 100, 100))]
    for final in (True, False):
        config = probe_data(linear_paper_epochs=2).config
        data = ProbeData(many[0], many[1], many[2] if final else None, 7, config)
        given = {f"{p.__name__.rpartition('.')[2]}.{m}" for p in (collapse, knn, linear) for m in p.run(data)}
        assert given == set(task.metrics(to_dict(config), final))


def test_metrics_of_other_sets_have_their_name_and_are_given_at_the_end() -> None:
    values = to_dict(tiny_config(probes=ProbeConfig(names=["knn"], data=["pets:/pets"])))
    assert set(task.metrics(values)) >= {"knn.holdout_top1", "knn.pets.test_top1"}
    assert task.metrics(values, final=False) == ["knn.holdout_top1", "knn.holdout_top5"]
    values["data"]["name"] = "images"
    assert "knn.test_top1" not in task.metrics(values)
    assert "knn.pets.test_top1" in task.metrics(values)
