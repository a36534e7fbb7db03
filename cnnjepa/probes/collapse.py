"""Detect collapse by the spread and effective rank of held-out features, without labels."""

import torch
import torch.nn.functional as F

from cnnjepa.probe_config import ProbeConfig
from cnnjepa.probes.features import ProbeData

METRICS = ("feature_std", "rankme")


def rankme(features_NC: torch.Tensor) -> float:
    """Return RankMe: exp of the singular values' entropy, 1 to min(N, C) (Garrido et al. 2023)."""
    values = torch.linalg.svdvals(features_NC.double())
    p = values / values.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def run(data: ProbeData) -> dict[str, float]:
    """Return feature_std, and rankme of at most 4096 features unless all are zero.

    feature_std is the mean over channels of the std of unit features, times sqrt(C): 1 for an even
    spread and 0 when collapsed. Raise ValueError if features are not finite.
    """
    features = data.holdout.features_NC
    if not features.isfinite().all():
        raise ValueError("features are not finite")
    if not features.any():
        return {"feature_std": 0.0}
    spread = F.normalize(features, dim=1).std(0).mean() * features.shape[1] ** 0.5
    return {"feature_std": float(spread), "rankme": rankme(features[:4096])}


def collapsed(metrics: dict[str, float], probes: ProbeConfig) -> str:
    """Return why a run with these metrics has collapsed, or "" if it has not or was not probed."""
    for key, least in (("collapse.feature_std", probes.collapsed_std), ("collapse.rankme", probes.collapsed_rankme)):
        value = metrics.get(key)
        if value is not None and value < least:
            return f"{key} is {value:.3g}, below {least:g}"
    return ""
