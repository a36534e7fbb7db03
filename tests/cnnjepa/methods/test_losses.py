"""Each method's loss once more, written down from its paper, with loops where the method has matrices."""

import pytest
import torch
from torch import Tensor

from tests.cnnjepa.methods.test_methods import batch_for, build, small


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum().sqrt()


def test_simclrs_loss_is_equation_1() -> None:
    from cnnjepa.methods.simclr import nt_xent_loss

    z1, z2 = torch.randn(2, 5, 4, dtype=torch.float64).unbind()
    z = [unit(v) for pair in zip(z1, z2, strict=True) for v in pair]  # a pair stands at 2k, 2k+1
    total = 0.0
    for i in range(10):
        j = i + 1 if i % 2 == 0 else i - 1
        others = sum(torch.exp(z[i] @ z[k] / 0.1) for k in range(10) if k != i)
        total += float(-torch.log(torch.exp(z[i] @ z[j] / 0.1) / others))
    assert float(nt_xent_loss(z1, z2, 0.1)) == pytest.approx(total / 10, rel=1e-12)


def test_byols_loss_is_half_its_papers_squared_distance_less_1() -> None:
    from cnnjepa.methods.byol import cosine_loss

    p1, t2, p2, t1 = torch.randn(4, 5, 6, dtype=torch.float64).unbind()
    squares = [(unit(p) - unit(t)).square().sum() for a, b in ((p1, t2), (p2, t1)) for p, t in zip(a, b, strict=True)]
    assert float(cosine_loss(p1, t2, p2, t1)) == pytest.approx(float(sum(squares)) / len(squares) / 2 - 1, rel=1e-12)


def test_vicregs_terms_are_equations_1_and_4() -> None:
    from cnnjepa.methods.vicreg import covariance_loss, variance_loss

    z = torch.randn(7, 3, dtype=torch.float64) * torch.tensor([0.3, 1.0, 3.0])
    n, d = z.shape
    mean = [sum(float(z[i, j]) for i in range(n)) / n for j in range(d)]
    c = [[sum((float(z[i, j]) - mean[j]) * (float(z[i, k]) - mean[k]) for i in range(n)) / (n - 1) for k in range(d)] for j in range(d)]
    assert float(variance_loss(z)) == pytest.approx(sum(max(0.0, 1 - (c[j][j] + 1e-4) ** 0.5) for j in range(d)) / d, rel=1e-12)
    assert float(covariance_loss(z)) == pytest.approx(sum(c[j][k] ** 2 for j in range(d) for k in range(d) if j != k) / d, rel=1e-12)


def test_vicregs_loss_weighs_its_terms_25_25_1() -> None:
    config = small("vicreg")
    method = build(config, torch.float64)
    batch = batch_for(config, method, dtype=torch.float64)
    out = method(batch)
    with torch.no_grad():
        z1, z2 = (method.head(method.encoder(v).mean((2, 3))) for v in batch.views)  # type: ignore[operator]
    assert out["invariance"].item() == pytest.approx(float((z1 - z2).square().mean()), rel=1e-9)
    weighed = 25 * out["invariance"] + 25 * out["variance"] + out["covariance"]
    assert out["loss"].item() == pytest.approx(weighed.item(), rel=1e-12)


def test_cnn_jepas_loss_is_one_minus_the_cosine() -> None:
    from cnnjepa.methods.cnn_jepa import masked_prediction_loss
    from cnnjepa.models.masked import Visibility

    prediction, target = torch.rand(2, 3, 6, 4, 4, dtype=torch.float64).unbind()
    hidden = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    cells = [(b, y, x) for b in range(3) for y in range(4) for x in range(4) if hidden[b, y, x]]
    cosines = [float(unit(prediction[b, :, y, x]) @ unit(target[b, :, y, x])) for b, y, x in cells]
    assert float(masked_prediction_loss(prediction, target, Visibility(~hidden))) == pytest.approx(1 - sum(cosines) / len(cells), rel=1e-12)


def test_ijepas_loss_is_the_mean_smooth_l1_to_normalised_features_at_the_targets() -> None:
    config = small("ijepa")
    method = build(config, torch.float64)
    for parameter in method.target_encoder.parameters():  # type: ignore[union-attr]
        parameter.data *= 1.1  # else it would not matter whose features they are
    batch = batch_for(config, method, dtype=torch.float64)
    context, targets = method.cells(batch)  # type: ignore[operator]
    with torch.no_grad():
        prediction = method.predictor(method.encoder.tokens(batch.views[0], context), context, targets)  # type: ignore[operator,union-attr]
        features = method.target_encoder(batch.views[0]).flatten(2)  # type: ignore[operator]
    total, count = 0.0, 0
    for b in range(8):
        for t in range(targets.shape[1]):
            for i, cell in enumerate(targets[b, t]):
                h = features[b, :, cell]
                h = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt()
                d = (prediction[b, t, i] - h).abs()
                total += float(torch.where(d < 1, d.square() / 2, d - 0.5).sum())
                count += len(h)
    assert method(batch)["loss"].item() == pytest.approx(total / count, rel=1e-9)


def test_the_supervised_loss_is_cross_entropy_and_held_out_labels_do_not_enter() -> None:
    config = small("supervised")
    method = build(config, torch.float64)
    batch = batch_for(config, method, dtype=torch.float64)
    assert batch.labels is not None
    batch.labels[2] = -1
    with torch.no_grad():
        scores = method.classifier(method.encoder(batch.views[0]).mean((2, 3)))  # type: ignore[operator]
    picked = [-torch.log(scores[i].exp()[batch.labels[i]] / scores[i].exp().sum()) for i in range(8) if i != 2]
    assert method(batch)["loss"].item() == pytest.approx(float(sum(picked)) / 8, rel=1e-9)
