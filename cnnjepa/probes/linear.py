"""Probe by one linear layer on frozen features, trained with Adam (paper, section IV-A).

Metrics are of the last epoch. The paper reports the best epoch on the split that it reports; that
is kept as `paper_protocol_top1` and used for no choice.
"""

import torch
import torch.nn.functional as F
from torch import nn

from cnnjepa.optim import AdamW
from cnnjepa.probes.features import ProbeData, topk_accuracy
from cnnjepa.randomness import Stream, integer


def run(data: ProbeData) -> dict[str, float]:
    """Return holdout_top1 and so on in percent; raise ValueError if features are not finite."""
    probes, fit = data.config.probes, data.fit
    if not fit.features_NC.isfinite().all():
        raise ValueError("features are not finite")
    random = torch.Generator().manual_seed(integer(data.config.seed, Stream.probe))
    device, (count, channels) = fit.features_NC.device, fit.features_NC.shape
    layer = nn.Linear(channels, data.classes)
    with torch.no_grad():
        bound = channels**-0.5
        layer.weight.uniform_(-bound, bound, generator=random)
        layer.bias.zero_()
    layer.to(device)
    # without decay it is Adam
    optimizer = AdamW(layer.parameters(), lr=probes.linear_lr, weight_decay=0.0, fused=True)
    best = 0.0
    for _ in range(probes.linear_epochs):
        for chosen in torch.randperm(count, generator=random).to(device).split(probes.batch_size):
            loss = F.cross_entropy(layer(fit.features_NC[chosen]), fit.labels_N[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if data.test is not None:
            with torch.no_grad():
                best = max(best, topk_accuracy(layer(data.test.features_NC), data.test.labels_N, data.classes)["top1"])
    metrics: dict[str, float] = {}
    with torch.no_grad():
        for part, held in data.judged().items():
            scores = layer(held.features_NC)
            metrics |= {f"{part}_{k}": v for k, v in topk_accuracy(scores, held.labels_N, data.classes).items()}
    if data.test is not None:
        metrics["paper_protocol_top1"] = best
    return metrics
