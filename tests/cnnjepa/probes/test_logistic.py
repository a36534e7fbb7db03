"""The linear probe's solver: it equals scikit-learn's, and where it has no solution it says so."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from cnnjepa.data.datasets import GreyImages, Splits, load_splits
from cnnjepa.data_config import DATA_PRESETS
from cnnjepa.probe_config import ProbeConfig
from cnnjepa.probes import _logistic, linear
from cnnjepa.probes._logistic import NotConvergedError, Problem, Standardised, stratified
from cnnjepa.probes.features import Features, ProbeData
from tests.support.tiny import tiny_config

CPU = torch.device("cpu")


def projected(splits: Splits, count: int, channels: int) -> tuple[Features, Features]:
    """Pixels through a random layer and a ReLU: features of which many are correlated. Train images, then test images."""
    random = torch.Generator().manual_seed(0)
    parts, weight = [], None
    for images in (splits.dataset.train, splits.dataset.test):
        assert isinstance(images, GreyImages)
        pixels = torch.from_numpy(images.pixels[:count].copy()).flatten(1).float() / 255
        weight = torch.randn(pixels.shape[1], channels, generator=random) / pixels.shape[1] ** 0.5 if weight is None else weight
        parts.append(Features((pixels @ weight).relu(), torch.from_numpy(images.labels[:count])))
    return parts[0], parts[1]


def standardised(rows: Tensor, by: Tensor) -> np.ndarray:
    mean, std = by.double().mean(0), by.double().std(0, correction=0)
    return ((rows.double() - mean) / torch.where(std > 0, std, 1.0)).numpy()


def compare(fit: Features, test: Features) -> None:
    """Hold the fit against scikit-learn's at the strength that was chosen."""
    found, rows = _logistic.fit(fit.features_NC, fit.labels_N, 1e-3, 2000)
    x, y, count = standardised(fit.features_NC, fit.features_NC), fit.labels_N.numpy(), len(fit.labels_N)
    theirs = LogisticRegression(C=1 / found.strength, tol=1e-7, max_iter=20_000).fit(x, y)
    objective = -theirs.predict_log_proba(x)[np.arange(count), y].mean() + found.strength / (2 * count) * (theirs.coef_**2).sum()
    assert found.objective == pytest.approx(objective, rel=1e-6)
    guesses = found.scores(rows.of(test.features_NC)).argmax(1).numpy()
    assert (guesses == theirs.predict(standardised(test.features_NC, fit.features_NC))).mean() >= 0.995


def test_it_equals_scikit_learn_on_digits() -> None:
    compare(*projected(load_splits(DATA_PRESETS["digits"]), 1000, 48))


@pytest.mark.slow
def test_it_equals_scikit_learn_on_fashion_mnist() -> None:
    try:
        splits = load_splits(DATA_PRESETS["fashion_mnist"])
    except ValueError as error:
        pytest.skip(str(error))
    compare(*projected(splits, 1800, 128))


def hard(count: int = 300, channels: int = 2048, classes: int = 10) -> Features:
    """Return features that a linear classifier fits without an error, with badly scaled columns.

    Scales range from 1e-6 to 1e6, some columns have means far from zero, 40 are constant, and one
    class has a single image.
    """
    random = np.random.default_rng(0)
    labels = random.integers(0, classes - 1, count)
    labels[17] = classes - 1
    x = np.eye(classes)[labels] @ random.normal(size=(classes, channels)) * 3 + random.normal(size=(count, channels))
    x = x * 10 ** random.uniform(-6, 6, channels)
    x[:, 40:200] += 100 * np.abs(x[:, 40:200]).max(0)
    x[:, :20], x[:, 20:40] = 0.1, 0.0
    return Features(torch.from_numpy(x).float(), torch.from_numpy(labels))


@pytest.mark.slow
def test_a_badly_scaled_separable_set_converges_or_says_that_it_did_not() -> None:
    found = hard()
    rows = Standardised(found.features_NC, torch.arange(300), CPU)
    assert (rows.scale == 0).sum() == 40
    problem = Problem(rows, found.labels_N, 300, rows.covariance())
    start = None
    for strength in (100.0, 1.0, 1e-3):
        fit = problem.solve(strength, 1e-3, 200, start)
        assert fit.converged
        start = fit.weights
        assert torch.equal(fit.scores(next(rows.chunks(0, 300))[1]).argmax(1), found.labels_N)
        # The bound that the gradient gives, checked by solving on.
        closer = problem.solve(strength, 1e-4, 200, fit.weights)
        assert 0 <= fit.objective / closer.objective - 1 <= 1e-6
        assert closer.converged
        assert (fit.weights - closer.weights)[:, :-1].norm() <= 1.1e-3 * closer.weights[:, :-1].norm()
    stopped = problem.solve(1e-3, 1e-3, 2)
    assert (stopped.converged, stopped.iterations) == (False, 2)
    assert stopped.gradient > 1e-3
    with pytest.raises(NotConvergedError, match=r"at strength 100 has not converged: .* after 1 iterations .* \(probes.linear_tolerance"):
        _logistic.fit(found.features_NC[:, :100], found.labels_N, 1e-3, 1)


def probe_data(fit: Features, holdout: Features, test: Features | None = None, classes: int = 10, **probes: object) -> ProbeData:
    return ProbeData(fit, holdout, test, classes, tiny_config(probes=ProbeConfig(**{"linear_paper_epochs": 1, **probes})))  # type: ignore[arg-type]


def test_a_probe_that_has_not_converged_has_no_score() -> None:
    fit, test = projected(load_splits(DATA_PRESETS["digits"]), 200, 16)
    with pytest.raises(NotConvergedError, match="not converged"):
        linear.run(probe_data(fit, test, linear_max_iterations=1))


def test_a_refit_that_has_not_converged_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, test = projected(load_splits(DATA_PRESETS["digits"]), 200, 16)
    honest = Problem.solve

    def few(self: Problem, strength: float, tolerance: float, most: int, start: Tensor | None = None) -> _logistic.Fit:
        return honest(self, strength, tolerance, 1 if self.count == 200 else most, start)

    monkeypatch.setattr(Problem, "solve", few)
    with pytest.raises(NotConvergedError, match="after 1 iterations"):
        linear.run(probe_data(fit, test))


def test_constant_features_give_the_most_frequent_class() -> None:
    labels = torch.tensor([0, 1, 1, 2, 1, 1, 0, 2])
    same = Features(torch.full((8, 4), 0.3), labels)
    metrics = linear.run(probe_data(same, same, classes=3))
    assert metrics["holdout_top1"] == 50.0


def test_classes_of_one_image_and_of_none() -> None:
    fit, test = projected(load_splits(DATA_PRESETS["digits"]), 300, 16)
    kept = torch.cat([(fit.labels_N < 8).nonzero().flatten(), (fit.labels_N == 9).nonzero().flatten()[:1]])
    few = Features(fit.features_NC[kept], fit.labels_N[kept])
    scores = linear.run(probe_data(few, test))
    present = test.labels_N < 8
    assert 40 < scores["holdout_top1"] <= 100 * present.double().mean().item() + 100 / len(present)
    alone = Features(fit.features_NC[[0, 1, 2]], torch.tensor([4, 5, 6]))  # nothing to choose the strength on
    metrics = linear.run(probe_data(alone, alone))
    assert (metrics["strength"], metrics["holdout_top1"], metrics["holdout_top5"]) == (1.0, 100.0, 100.0)
    absent = Features(alone.features_NC, torch.tensor([7, 8, 9]))
    assert linear.run(probe_data(alone, absent))["holdout_top5"] == 0.0  # a class without an image is never a guess


def test_the_strength_is_chosen_on_the_fitted_images_alone() -> None:
    fit, test = projected(load_splits(DATA_PRESETS["digits"]), 300, 16)
    other = Features(torch.randn(test.features_NC.shape, generator=torch.Generator().manual_seed(1)), test.labels_N)
    metrics = [linear.run(probe_data(fit, holdout, judged)) for holdout, judged in ((test, test), (other, None), (test, other))]
    assert len({(m["strength"], m["iterations"], m["relative_gradient"]) for m in metrics}) == 1
    assert metrics[0]["holdout_top1"] == metrics[2]["holdout_top1"] != metrics[1]["holdout_top1"]


def test_the_chosen_strength_has_the_least_loss_on_the_held_part_of_a_path() -> None:
    fit, _ = projected(load_splits(DATA_PRESETS["digits"]), 400, 32)
    chosen, _ = _logistic.fit(fit.features_NC, fit.labels_N, 1e-3, 2000)
    order, count = stratified(fit.labels_N)
    rows = Standardised(fit.features_NC, order, CPU)
    problem = Problem(rows, fit.labels_N[order], count, rows.covariance())
    losses = {s: problem.held_loss(problem.solve(s, 1e-3, 2000)) for s in _logistic.STRENGTHS if s <= 400}
    assert chosen.strength == min(losses, key=lambda s: losses[s])
    assert min(losses) < chosen.strength < max(losses)


def test_the_held_part_is_a_fifth_of_each_class() -> None:
    labels = torch.tensor([0] * 10 + [1] * 2 + [2] + [3] * 100)
    order, count = stratified(labels)
    assert sorted(order.tolist()) == list(range(113))
    assert labels[order[count:]].bincount().tolist() == [2, 1, 0, 20]
    assert order[count:].tolist() != sorted(order.tolist())[count:]
    assert all(torch.equal(a, b) for a, b in zip(stratified(labels)[:1], (order,), strict=True))


def test_streamed_features_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_logistic, "CHUNK_ROWS", 128)
    fit, test = projected(load_splits(DATA_PRESETS["digits"]), 500, 16)
    fits = [_logistic.fit(fit.features_NC, fit.labels_N, 1e-3, 2000, keep) for keep in (True, False, True)]
    assert all(torch.equal(found.weights, fits[0][0].weights) for found, _ in fits)
    assert [rows._whole is None for _, rows in fits] == [False, True, False]
    monkeypatch.setattr(_logistic, "_free_bytes", lambda _: 0)
    assert _logistic.fit(fit.features_NC, fit.labels_N, 1e-3, 2000)[1]._whole is None
    assert linear.run(probe_data(fit, test)) == linear.run(probe_data(fit, test))
