from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from cnnjepa.config import ProbeConfig
from cnnjepa.data import loader
from cnnjepa.data.datasets import load_splits
from cnnjepa.distributed import Ranks
from cnnjepa.models.resnet import build_encoder
from cnnjepa.probes import collapse, features, knn, linear, run_probes
from cnnjepa.probes.features import Features, ProbeData, calibrate_batchnorm, pooled_features, topk_accuracy
from cnnjepa.runs import RunFolder, RunStatus
from cnnjepa.train import train
from tests.cnnjepa.test_train import assert_bitwise_equal, final_state, run
from tests.tiny import tiny_config

ALONE = Ranks(0, 1, torch.device("cpu"))


def blobs(n: int, seed: int, classes: int = 3, spread: float = 0.3) -> Features:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=random)
    return Features(torch.eye(8)[labels] + spread * torch.randn(n, 8, generator=random), labels)


def probe_data(final: bool = True, **probes: object) -> ProbeData:
    config = tiny_config(probes=ProbeConfig(**{"batch_size": 32, "linear_lr": 0.05, "linear_epochs": 30, **probes}))  # type: ignore[arg-type]
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


def test_linear_learns_what_is_separable_and_chance_what_is_not() -> None:
    assert linear.run(probe_data())["test_top1"] > 95
    shuffled = probe_data()
    shuffled.fit.labels_N = shuffled.fit.labels_N[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert linear.run(shuffled)["test_top1"] < 70


def test_the_headline_is_the_last_epoch_and_the_best_stands_apart() -> None:
    metrics = linear.run(probe_data(linear_epochs=3, linear_lr=0.3))
    assert metrics["paper_protocol_top1"] >= metrics["test_top1"]


def test_test_images_are_not_read_before_the_end() -> None:
    metrics = {**linear.run(probe_data(final=False)), **knn.run(probe_data(final=False))}
    assert {k.split("_")[0] for k in metrics} == {"holdout"}


def test_top5_only_where_classes_allow() -> None:
    scores = torch.eye(6)
    assert set(topk_accuracy(scores, torch.arange(6), 6)) == {"top1", "top5"}
    assert topk_accuracy(torch.eye(3), torch.tensor([0, 1, 0]), 3) == {"top1": pytest.approx(200 / 3)}


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
    data.holdout.features_NC = torch.zeros(500, 8)
    assert collapse.run(data) == {"feature_std": 0.0}


def test_collapsed_is_what_falls_below_a_limit_and_what_was_not_probed_is_not() -> None:
    probes = tiny_config().probes
    assert collapse.collapsed({"collapse.feature_std": 0.2, "collapse.rankme": 9.0}, probes) == ""
    assert collapse.collapsed({}, probes) == ""
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


def test_features_are_those_of_the_frozen_encoder_and_leave_it_unchanged() -> None:
    config = tiny_config()
    splits = load_splits(config.data)
    encoder = build_encoder(config.encoder, 0).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    features = pooled_features(encoder, config, splits, splits.dataset.test, splits.test, ALONE)
    assert features.shape == (60, 32)
    assert encoder.training
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert run_probes(encoder, config, splits, ALONE, final=True)[1] == {}


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
