"""Probe by k-NN, votes weighted by exp(cosine / temperature) (paper, section IV-A)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnjepa.probes.features import ProbeData, topk_accuracy

METRICS = ("holdout_top1", "holdout_top5", "test_top1", "test_top5")


@torch.no_grad()
def knn_scores(bank_NC: Tensor, labels_N: Tensor, query_MC: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Return the votes [M, classes] of the k nearest bank rows; k is clipped to the bank size."""
    bank = F.normalize(bank_NC, dim=1)
    votes = []
    for query in F.normalize(query_MC, dim=1).split(1024):
        similarity, nearest = (query @ bank.T).topk(min(k, len(bank)), dim=1)
        # This scales all votes of a query alike. Else a small temperature would leave only zeros.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.append(weights.new_zeros(len(query), classes).scatter_add_(1, labels_N[nearest], weights))
    return torch.cat(votes)


def run(data: ProbeData) -> dict[str, float]:
    """Return holdout_top1 and so on in percent; raise ValueError if features are not finite."""
    probes, fit = data.config.probes, data.fit
    if not fit.features_NC.isfinite().all():
        raise ValueError("features are not finite")
    metrics: dict[str, float] = {}
    for part, held in data.judged().items():
        scores = knn_scores(fit.features_NC, fit.labels_N, held.features_NC, data.classes, probes.knn_k, probes.knn_temperature)
        metrics |= {f"{part}_{k}": v for k, v in topk_accuracy(scores, held.labels_N, data.classes).items()}
    return metrics
