"""Probe by a linear classifier on frozen features.

The headline is multinomial logistic regression on standardised features, solved until it has
converged (_logistic.py). It is fitted on `fit` alone, where its L2 strength is chosen too.

The paper's own probe (section IV-A) is kept as `paper_protocol_top1` and used for no choice.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnjepa.optim import AdamW
from cnnjepa.probes import _logistic
from cnnjepa.probes.features import Features, ProbeData, topk_accuracy
from cnnjepa.randomness import Stream, integer

_SCORES = ("holdout_top1", "holdout_top5", "test_top1", "test_top5", "paper_protocol_top1")
METRICS = (*_SCORES, "strength", "iterations", "relative_gradient")


def run(data: ProbeData) -> dict[str, float]:
    """Return holdout_top1 and so on in percent, and the strength behind them.

    Raise ValueError if features are not finite, and NotConvergedError instead of a score of weights
    that are not the solution.
    """
    data.require_finite()
    classifier = Classifier.of(data, data.fit)
    found = classifier.fit
    metrics = {"strength": found.strength, "iterations": float(found.iterations), "relative_gradient": found.gradient}
    for name, part in data.judged().items():
        metrics |= {f"{name}_{k}": v for k, v in classifier.accuracy(part).items()}
    del classifier  # its rows are as large as the features
    return metrics if data.test is None else {**metrics, **paper_protocol(data, data.test)}


@dataclass(frozen=True)
class Classifier:
    """Hold the converged classifier of some images."""

    fit: _logistic.Fit
    rows: _logistic.Standardised
    present: Tensor  # classes that have an image
    classes: int

    @staticmethod
    def of(data: ProbeData, images: Features) -> "Classifier":
        """Fit `images`, features of the set of `data`; raise NotConvergedError if that has no end."""
        probes = data.config.probes
        present, labels = images.labels_N.unique(return_inverse=True)
        found, rows = _logistic.fit(images.features_NC, labels, probes.linear_tolerance, probes.linear_max_iterations)
        return Classifier(found, rows, present, data.classes)

    def accuracy(self, part: Features) -> dict[str, float]:
        """Return top1 and top5 of other images, in percent."""
        scores = class_scores(self.fit, self.rows, part, self.present, self.classes)
        return topk_accuracy(scores, part.labels_N, self.classes)


def class_scores(found: _logistic.Fit, rows: _logistic.Standardised, part: Features, present: Tensor, classes: int) -> Tensor:
    """Return the scores [M, classes] of a part, minus infinity for classes without a fitted image."""
    scores = torch.full((len(part.labels_N), classes), -torch.inf, dtype=torch.float64, device=rows.device)
    scores[:, present] = torch.cat([found.scores(rows.of(chunk)) for chunk in part.features_NC.split(_logistic.CHUNK_ROWS)])
    if not scores[:, present].isfinite().all():
        raise ValueError("scores are not finite")
    return scores


def paper_protocol(data: ProbeData, test: Features) -> dict[str, float]:
    """Return the paper's score: Adam on all training labels, the best epoch on the test split.

    The batches are drawn once and are the same in every epoch.
    """
    probes, device = data.config.probes, data.fit.labels_N.device
    random = torch.Generator().manual_seed(integer(data.config.seed, Stream.probe))
    features = torch.cat([data.fit.features_NC, data.holdout.features_NC])
    labels = torch.cat([data.fit.labels_N, data.holdout.labels_N])
    layer = nn.Linear(features.shape[1], data.classes)
    with torch.no_grad():
        bound = features.shape[1] ** -0.5
        layer.weight.uniform_(-bound, bound, generator=random)
        layer.bias.zero_()
    layer.to(device)
    # without decay it is Adam
    optimizer = AdamW(layer.parameters(), lr=probes.linear_paper_lr, weight_decay=0.0, fused=True)
    batches = torch.randperm(len(labels), generator=random).to(device).split(probes.linear_paper_batch_size)
    best = 0.0
    for _ in range(probes.linear_paper_epochs):
        for chosen in batches:
            loss = F.cross_entropy(layer(features[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            best = max(best, topk_accuracy(layer(test.features_NC), test.labels_N, data.classes)["top1"])
    return {"paper_protocol_top1": best}
