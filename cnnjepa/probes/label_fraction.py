"""Evaluate frozen features with a share of the labels, such as 1 and 10 %.

A converged logistic regression is taught by them (_logistic.py), for several draws of the images.
Each class keeps its share, and at least one image.
"""

from collections.abc import Mapping
from typing import Any

from cnnjepa.probes import _draws
from cnnjepa.probes.features import ProbeData


def called(percent: float) -> str:
    """Return how the scores of a share begin."""
    return f"percent{percent:g}".replace(".", "_")


def metrics(probes: Mapping[str, Any]) -> list[str]:
    """Return the names of the scores under these settings."""
    names = _draws.score_names(probes["label_fraction_draws"])
    return ["draws", *[f"{called(share)}_{name}" for share in probes["label_fraction_percent"] for name in ["images", *names]]]


def run(data: ProbeData) -> dict[str, float]:
    """Return percent1_test_top1 and so on, means in percent, percent1_test_spread over the draws, and percent1_images.

    Raise ValueError if features are not finite.
    """
    data.require_finite()
    probes, images = data.config.probes, _draws.counts(data.fit.labels_N)
    found = {"draws": float(probes.label_fraction_draws)}
    for percent in probes.label_fraction_percent:
        sizes = {label: max(round(percent / 100 * count), 1) for label, count in images.items()}
        scores = _draws.over_draws(data, sizes, probes.label_fraction_draws)
        found |= {f"{called(percent)}_{name}": value for name, value in {"images": float(sum(sizes.values())), **scores}.items()}
    return found
