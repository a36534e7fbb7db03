"""Evaluate frozen features of corrupted test images, by a classifier fitted to features of clean ones.

The classifier is that of the linear probe. The corruptions are in _corruptions.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from cnnjepa.config import TrainConfig
from cnnjepa.data.datasets import Indices, Splits
from cnnjepa.distributed import gather_rows
from cnnjepa.probes._corruptions import corrupted
from cnnjepa.probes._evaluation import EvaluationError, Kept
from cnnjepa.probes.features import Features, ProbeData, pooled_features
from cnnjepa.probes.linear import Classifier
from cnnjepa.randomness import Stream, generator
from cnnjepa.run.ranks import Ranks, broadcast_object, first_of


def metrics(probes: Mapping[str, Any]) -> list[str]:
    """Return the names of the scores under these settings."""
    parts = [*probes["robustness_corruptions"], *[f"severity{s}" for s in probes["robustness_severities"]]]
    return ["clean_test_top1", "test_top1", *[f"{part}_test_top1" for part in parts]]


def images(config: TrainConfig, splits: Splits) -> int:
    """Return the number of test images behind each score."""
    return min(config.probes.robustness_images or len(splits.test), len(splits.test))


def _chosen(config: TrainConfig, splits: Splits) -> Indices:
    order = generator(0, Stream.probe, 3).permutation(len(splits.test))[: images(config, splits)]
    chosen: Indices = splits.test[np.sort(order)]
    return chosen


def run_on(encoder: nn.Module, config: TrainConfig, splits: Splits, data: ProbeData | None, ranks: Ranks, kept: Kept) -> dict[str, float]:
    """Return top-1 in percent of clean images, of all corruptions together, of each one, and of each severity.

    Call this on all ranks; `data` are the features of clean images on the main one. Those of each
    corruption are computed in one pass, and its score is kept.
    """
    probes, chosen = config.probes, _chosen(config, splits)
    labels = splits.dataset.test.labels[chosen]
    scores: dict[str, float] = {str(k): float(v) for k, v in ((kept.state() or {}).get("scores") or {}).items()}
    todo = [f"{kind} {severity}" for kind in probes.robustness_corruptions for severity in probes.robustness_severities]
    todo = [each for each in ["clean 0", *todo] if each not in scores]
    classifier: Classifier | None = None
    cause = ""
    if data is not None and todo:
        try:
            if not data.fit.features_NC.isfinite().all():
                raise ValueError("features are not finite")
            classifier = Classifier.of(data, data.fit)
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
    if first := first_of(cause, ranks):  # the main rank alone fits: all are told
        raise EvaluationError(first)
    for each in todo:
        kind, severity = each.split()

        def change(pixels: Tensor, positions: list[int], kind: str = kind, severity: str = severity) -> Tensor:
            return pixels if kind == "clean" else corrupted(pixels, kind, int(severity), chosen[positions].tolist())

        share, cause = None, ""
        try:
            share = pooled_features(encoder, config, splits, splits.dataset.test, chosen, ranks, change)
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
        if (first := first_of(cause, ranks)) or share is None:
            raise EvaluationError(first)
        features = gather_rows(share, ranks)
        score, cause = 0.0, ""
        try:
            if classifier is not None:
                score = classifier.accuracy(Features(features, classifier.present.new_tensor(labels.tolist())))["top1"]
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
        if first := first_of(cause, ranks):
            raise EvaluationError(first)
        scores[each] = broadcast_object(score, ranks)
        kept.go_on({"scores": dict(scores)})
    means = {"clean_test_top1": scores["clean 0"]}
    pairs = {tuple(each.split()): score for each, score in scores.items() if each != "clean 0"}
    means["test_top1"] = float(np.mean(list(pairs.values())))
    for kind in probes.robustness_corruptions:
        means[f"{kind}_test_top1"] = float(np.mean([score for (k, _), score in pairs.items() if k == kind]))
    for level in probes.robustness_severities:
        means[f"severity{level}_test_top1"] = float(np.mean([score for (_, s), score in pairs.items() if int(s) == level]))
    return means
