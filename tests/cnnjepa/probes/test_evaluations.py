"""Few labels, fine-tuning and corruptions: right by references of their own, and a stop costs none of their work."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from cnnjepa import task
from cnnjepa.config import EncoderConfig, EncoderName, TrainConfig
from cnnjepa.data.datasets import load_splits
from cnnjepa.models.encoders import build_encoder
from cnnjepa.probe_config import CORRUPTIONS, EVALUATIONS, ProbeConfig
from cnnjepa.probes import (
    _corruptions,
    _draws,
    _evaluation,
    few_shot,
    finetune,
    label_fraction,
    linear,
    robustness,
    run_probes,
    values_of,
)
from cnnjepa.probes._evaluation import Conditions
from cnnjepa.probes.features import Features, ProbeData
from cnnjepa.rules import validate
from cnnjepa.run.folder import EvaluationStopped, RunFolder
from cnnjepa.run.identity import signature, to_dict
from cnnjepa.run.ranks import Ranks
from sweeps.report.aggregate import costs_of
from tests.support.runs import comparable, run
from tests.support.tiny import tiny_config

ALONE = Ranks(0, 1, torch.device("cpu"))
SMALL = {
    "few_shot_images": [1, 3],
    "few_shot_draws": 2,
    "label_fraction_percent": [2.5, 20.0],
    "label_fraction_draws": 2,
    "finetune_epochs": 3,
    "finetune_warmup_epochs": 1.0,
    "finetune_batch_size": 16,
    "robustness_corruptions": ["gaussian_noise", "contrast"],
    "robustness_severities": [1, 5],
    "robustness_images": 40,
}


def evaluated(*names: str, **probes: object) -> TrainConfig:
    return tiny_config(probes=ProbeConfig(names=list(names), linear_paper_epochs=2, **{**SMALL, **probes}))  # type: ignore[arg-type]


def part(count: int, seed: int, classes: int = 4) -> Features:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=random)
    centres = torch.randn(classes, 12, generator=torch.Generator().manual_seed(0))
    return Features(3 + centres[labels] + torch.randn(count, 12, generator=random), labels)


def features(**probes: object) -> ProbeData:
    return ProbeData(part(400, 1), part(500, 2), part(600, 3), 4, evaluated(**probes))


@pytest.mark.parametrize("percent", [1.5, 10.0, 100.0])
def test_few_labels_score_as_sklearns_classifier_of_the_same_images_does(percent: float) -> None:
    data = features(label_fraction_percent=[percent], label_fraction_draws=3)
    found = label_fraction.run(data)
    sizes = {label: max(round(percent / 100 * count), 1) for label, count in enumerate(data.fit.labels_N.bincount().tolist())}
    assert data.test is not None
    theirs = []
    for draw in range(3):
        chosen = _draws.drawn(data.fit.labels_N, sizes, draw)
        assert data.fit.labels_N[chosen].bincount().tolist() == list(sizes.values())
        scaler = StandardScaler().fit(data.fit.features_NC[chosen].double().numpy())
        few = Features(data.fit.features_NC[chosen], data.fit.labels_N[chosen])
        # The strength is chosen as the linear probe does; sklearn solves at that strength.
        strength = linear._logistic.fit(few.features_NC, few.labels_N, 1e-3, 1000)[0].strength
        solver = LogisticRegression(C=1 / strength, tol=1e-8, max_iter=10_000)
        solver.fit(scaler.transform(few.features_NC.double().numpy()), few.labels_N.numpy())
        theirs.append(100 * solver.score(scaler.transform(data.test.features_NC.double().numpy()), data.test.labels_N.numpy()))
    called = f"percent{percent:g}".replace(".", "_")
    assert found[f"{called}_images"] == sum(sizes.values())
    assert found[f"{called}_test_top1"] == pytest.approx(np.mean(theirs), abs=0.5)
    assert found[f"{called}_test_spread"] == pytest.approx(np.std(theirs, ddof=1), abs=0.5)


def test_more_images_of_a_draw_hold_those_of_fewer_and_draws_differ() -> None:
    labels = part(400, 1).labels_N
    few, more, other = (set(_draws.drawn(labels, dict.fromkeys(range(4), n), draw).tolist()) for n, draw in ((2, 0), (9, 0), (2, 1)))
    assert few < more
    assert few != other
    assert [len(few), len(more)] == [8, 36]


def test_few_shot_is_the_mean_over_draws_with_their_spread() -> None:
    data = features(few_shot_images=[3], few_shot_draws=4)
    found = few_shot.run(data)
    each = [_draws.taught(data, _draws.drawn(data.fit.labels_N, dict.fromkeys(range(4), 3), draw))["test_top1"] for draw in range(4)]
    assert found["draws"] == 4
    assert found["shots3_test_top1"] == pytest.approx(np.mean(each))
    assert found["shots3_test_spread"] == pytest.approx(np.std(each, ddof=1))
    assert len(set(each)) > 1
    assert "shots3_test_spread" not in few_shot.run(features(few_shot_images=[3], few_shot_draws=1)), "one draw has no spread"


def test_a_class_with_fewer_images_is_named() -> None:
    data = features(few_shot_images=[1, 10])
    data.fit.labels_N[data.fit.labels_N == 2] = 0
    data.fit.labels_N[:4] = 2
    with pytest.raises(ValueError, match=r"few_shot_images must be at most 4, the labelled training images of class 2; got 10"):
        few_shot.run(data)


def test_each_corruption_is_what_it_says_and_grows_with_its_severity() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(60, 180, (3, 3, 64, 64), np.uint8))
    pixels[:, :, :32] //= 2
    for kind in CORRUPTIONS:
        levels = [_corruptions.corrupted(pixels, kind, severity, [4, 5, 6]) for severity in range(1, 6)]
        changes = [(level.float() - pixels.float()).abs().mean().item() for level in levels]
        assert 0 < changes[0] < changes[2] < changes[4], (kind, changes)
        assert all(level.dtype == torch.uint8 and level.shape == pixels.shape for level in levels)
        one = _corruptions.corrupted(pixels[2:], kind, 3, [6])
        assert torch.equal(one[0], levels[2][2]), f"{kind} depends on the position of the image, not on its batch"
    hue, saturation, value = np.moveaxis(rgb_to_hsv(pixels[0].permute(1, 2, 0).numpy() / 255), -1, 0)
    theirs = 255 * hsv_to_rgb(np.stack([hue, saturation, np.clip(value + 0.2, 0, 1)], -1))
    ours = _corruptions.corrupted(pixels, "brightness", 2, [0, 1, 2])[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs).max() <= 0.51
    black = _corruptions.corrupted(torch.zeros_like(pixels), "brightness", 2, [0, 1, 2])
    assert (black == 51).all()
    salted = _corruptions.corrupted(pixels, "impulse_noise", 5, [0, 1, 2])
    shares = [(salted == value).float().mean().item() for value in (0, 255)]
    assert shares == pytest.approx([0.135, 0.135], abs=0.02)
    noise = (_corruptions.corrupted(torch.full_like(pixels, 128), "gaussian_noise", 1, [0, 1, 2]).float() - 128).std().item()
    assert noise == pytest.approx(0.08 * 255, rel=0.05)
    four = _corruptions.corrupted(torch.cat([pixels, pixels[:, :1]], 1), "jpeg", 5, [0, 1, 2])
    assert torch.equal(four[:, 3:], _corruptions.corrupted(pixels[:, :1], "jpeg", 5, [0, 1, 2]))


def test_robustness_is_the_clean_classifier_on_corrupted_images() -> None:
    config = evaluated("linear", "robustness", robustness_images=0)
    splits, encoder = load_splits(config.data), build_encoder(config.encoder, config.data.image_size, 0, 3)
    found = run_probes(encoder, config, splits, ALONE, final=True)
    values = {name.removeprefix("robustness."): value for name, value in found.metrics.items() if name.startswith("robustness.")}
    assert values["clean_test_top1"] == found.metrics["linear.test_top1"]
    each = [values[f"{name}_test_top1"] for name in ("gaussian_noise", "contrast")]
    levels = [values[f"severity{level}_test_top1"] for level in (1, 5)]
    assert values["test_top1"] == pytest.approx(np.mean(each)) == pytest.approx(np.mean(levels))
    assert values["test_top1"] < values["clean_test_top1"]
    assert found.images["robustness.test_top1"] == len(splits.test)
    fewer = run_probes(encoder, evaluated("robustness"), splits, ALONE, final=True)
    assert fewer.images["robustness.test_top1"] == robustness.images(evaluated("robustness"), splits) == 40


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_give_the_metrics_that_they_declare_at_the_end_alone(name: str) -> None:
    config = evaluated(name)
    config.data.train_limit = 300
    splits, encoder = load_splits(config.data), build_encoder(config.encoder, config.data.image_size, 0, 3)
    found = run_probes(encoder, config, splits, ALONE, final=True)
    assert found.missing == {}
    assert set(found.metrics) == set(task.metrics(to_dict(config)))
    assert all(found.images[metric] and found.chance[metric] >= 10 for metric in found.metrics if "_top" in metric)
    assert list(found.hours) == [name]
    assert task.metrics(to_dict(config), final=False) == []
    assert run_probes(encoder, config, splits, ALONE, final=False).metrics == {}


def test_titles_are_words() -> None:
    titles = {
        "few_shot.shots5_test_top1": "few-shot top-1, test, 5 images a class",
        "label_fraction.fashion_mnist.percent2_5_holdout_top1": "few labels top-1, held-out of fashion_mnist, 2.5 % of the labels",
        "robustness.severity3_test_top1": "robustness top-1, test, severity 3",
        "robustness.gaussian_noise_test_top1": "robustness top-1, test, gaussian noise",
        "finetune.test_top1": "fine-tuned top-1, test",
        "linear.paper_protocol_top1": "linear top-1, test, best epoch",
    }
    assert {metric: task.title(metric) for metric in titles} == titles


def stops_at(call: int) -> Callable[[], bool]:
    """Ask to stop at that look."""
    looks = iter(range(1_000_000))
    return lambda: next(looks) == call


@pytest.mark.parametrize(("name", "looks"), [("finetune", [0, 1, 2]), ("robustness", [0, 1])])
def test_stopped_and_started_again_an_evaluation_ends_with_the_same_values(
    name: str, looks: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "_LOOK_STEPS", 3)
    config = evaluated(name)
    splits, encoder = load_splits(config.data), build_encoder(config.encoder, config.data.image_size, 0, 3)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    whole = run_probes(encoder, config, splits, ALONE, final=True)
    for look in looks:
        with pytest.raises(EvaluationStopped):
            run_probes(encoder, config, splits, ALONE, final=True, conditions=Conditions(tmp_path, stops_at(look)))
        assert [file.suffix for file in tmp_path.iterdir()] == [".pt"]
    passes = []
    monkeypatch.setattr(_evaluation.Kept, "go_on", lambda self, state, more=dict: passes.append(state))
    conditions = Conditions(tmp_path)
    resumed = run_probes(encoder, config, splits, ALONE, final=True, conditions=conditions)
    assert resumed.metrics == whole.metrics
    assert 0 < len(passes) < (5 if name == "robustness" else 8), "some of it was there"
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]
    later = Conditions(tmp_path)
    known = run_probes(encoder, config, splits, ALONE, final=True, conditions=later)
    assert (known.metrics, known.hours, later.spent) == (whole.metrics, resumed.hours, {})
    assert 3600 * resumed.hours[name] / config.threads > conditions.spent[name] > 0, "with what it took before the stops"
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items()), "a copy is fine-tuned"


def test_fine_tuning_learns_from_the_labelled_training_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = evaluated("finetune", finetune_epochs=8, finetune_lr=0.01)
    config.data.train_limit, config.data.holdout_fraction = 600, 0.3
    splits, encoder = load_splits(config.data), build_encoder(config.encoder, config.data.image_size, 0, 3)
    seen: list[torch.Tensor] = []
    loader = finetune.train_loader

    def watched(*given: object) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        for views, labels in loader(*given):  # type: ignore[arg-type]
            seen.append(labels)
            yield views, labels

    monkeypatch.setattr(finetune, "train_loader", watched)
    found = run_probes(encoder, config, splits, ALONE, final=True)
    assert found.missing == {}
    assert found.metrics["finetune.test_top1"] > 40, "chance is 10"
    labels = torch.cat(seen)
    assert (labels >= 0).all(), "an image that is held out has the label -1"
    assert len(labels) == 8 * (len(splits.fit) // 16) * 16


def test_what_another_encoder_or_setting_has_kept_is_not_taken(tmp_path: Path) -> None:
    config = evaluated("few_shot")
    splits = load_splits(config.data)
    for seed, probes in ((0, {}), (1, {}), (0, {"few_shot_draws": 3})):
        encoder = build_encoder(config.encoder, config.data.image_size, seed, 3)
        run_probes(encoder, evaluated("few_shot", **probes), splits, ALONE, final=True, conditions=Conditions(tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_file_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = evaluated("few_shot")
    splits, encoder = load_splits(config.data), build_encoder(config.encoder, config.data.image_size, 0, 3)
    whole = run_probes(encoder, config, splits, ALONE, final=True, conditions=Conditions(tmp_path))
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-20])
    with caplog.at_level(logging.WARNING):
        assert run_probes(encoder, config, splits, ALONE, final=True, conditions=Conditions(tmp_path)).metrics == whole.metrics
    assert "few_shot is computed again: " in caplog.text


def test_where_nothing_can_be_kept_an_evaluation_still_has_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, data: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(_evaluation, "write_atomic", full)
    monkeypatch.setattr(_evaluation, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(finetune, "_LOOK_STEPS", 3)
    config = evaluated("finetune", "few_shot")
    splits, encoder = load_splits(config.data), build_encoder(config.encoder, config.data.image_size, 0, 3)
    found = run_probes(encoder, config, splits, ALONE, final=True, conditions=Conditions(tmp_path))
    assert found.missing == {}
    assert {"finetune.test_top1", "few_shot.shots1_test_top1"} <= found.metrics.keys()
    assert "the state of finetune cannot be kept: " in caplog.text
    assert "few_shot cannot be kept: " in caplog.text


def test_an_error_of_one_rank_alone_ends_it_and_one_of_all_is_a_missing_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several ranks, which are played by one: the others would wait in a collective call."""
    config = evaluated("finetune")
    splits, encoder = load_splits(config.data), build_encoder(config.encoder, config.data.image_size, 0, 3)
    monkeypatch.setattr("cnnjepa.probes.first_of", lambda text, ranks: text)

    def raises(error: Exception) -> Callable[..., dict[str, float]]:
        def run_on(*_: object) -> dict[str, float]:
            raise error

        return run_on

    two = Ranks(0, 2, torch.device("cpu"))
    monkeypatch.setattr(finetune, "run_on", raises(_evaluation.EvaluationError("no image for each rank")))
    assert values_of("finetune", encoder, config, splits, None, two, None) == (None, "EvaluationError: no image for each rank")
    monkeypatch.setattr(finetune, "run_on", raises(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        values_of("finetune", encoder, config, splits, None, two, None)
    assert values_of("finetune", encoder, config, splits, None, ALONE, None)[1].startswith("OutOfMemoryError: CUDA")


def test_fine_tuning_leaves_alone_what_is_fixed() -> None:
    config = tiny_config(encoder=EncoderConfig(EncoderName.vit_tiny, patch_size=8, vit_depth=1))
    encoder = build_encoder(config.encoder, 32, 0, 3).requires_grad_(False)
    net = finetune._Net(encoder, config, 4, 0)
    assert [name for name, parameter in net.named_parameters() if not parameter.requires_grad] == ["encoder.pos_embed"]


def test_collapsed_features_are_not_evaluated() -> None:
    config = evaluated("finetune", "collapse")
    config.probes.collapsed_rankme = 1000.0
    splits, encoder = load_splits(config.data), build_encoder(config.encoder, config.data.image_size, 0, 3)
    found = run_probes(encoder, config, splits, ALONE, final=True)
    assert found.missing["finetune"].startswith("not computed, since the features have collapsed: collapse.rankme is ")


def test_a_run_that_is_stopped_in_an_evaluation_goes_on_there_and_its_cost_stands_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "_LOOK_STEPS", 3)
    config = evaluated("linear", "finetune", "few_shot")
    began = time.perf_counter()
    run(config, tmp_path / "whole")
    took = time.perf_counter() - began
    steps, looked = 0, []

    def stop() -> bool:
        looked.append(1)
        return len(looked) == steps + 2

    steps = len(RunFolder(tmp_path / "whole").metrics()) - 1  # a look at each step; the last record is of the probes
    assert run(config, tmp_path / "stopped", should_stop=stop) is None
    assert list((tmp_path / "stopped" / "evaluations").glob("finetune-*.pt"))
    result = run(config, tmp_path / "stopped")
    assert result is not None
    assert comparable(tmp_path / "stopped")[1] == comparable(tmp_path / "whole")[1]
    assert set(result.evaluation_hours) == {"finetune", "few_shot"}
    whole = RunFolder(tmp_path / "whole").result()
    assert whole is not None
    hours = sum(whole.evaluation_hours.values())
    assert whole.seconds < took - 3600 * hours / config.threads + 0.1
    assert costs_of(whole, 32)["evaluation_hours"] == pytest.approx(hours)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"few_shot_images": [0]}, r"probes.few_shot_images must lie in \[1, 1000000\]; got 0"),
        ({"few_shot_images": []}, "probes.few_shot_images must hold at least one value; got none"),
        ({"label_fraction_percent": [101.0]}, r"probes.label_fraction_percent must lie in \(0, 100\]; got 101.0"),
        ({"label_fraction_percent": [1.0, 1.0]}, "probes.label_fraction_percent must hold no value twice; got 1.0, 1.0"),
        ({"robustness_corruptions": ["fog"]}, "probes.robustness_corruptions must hold only gaussian_noise, .*; got fog"),
        ({"robustness_severities": [6]}, r"probes.robustness_severities must lie in \[1, 5\]; got 6"),
        ({"finetune_warmup_epochs": 3.0}, r"probes.finetune_warmup_epochs must lie in \[0, 3\), below finetune_epochs; got 3.0"),
        ({"finetune_lr": 0.0}, "probes.finetune_lr must be positive and finite; got 0.0"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        validate(evaluated("linear", **change))


def test_a_run_without_evaluations_has_the_run_id_that_it_had() -> None:
    assert signature(tiny_config()) == "4d69d59d0eb86ca4", "as before there were evaluations"
    assert signature(evaluated("linear", finetune_epochs=7)) != signature(evaluated("linear", finetune_epochs=8))
