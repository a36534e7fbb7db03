"""Evaluate frozen features with one or a few labelled images of each class.

A converged logistic regression is taught by them (_logistic.py), for several draws of the images.
"""

from collections.abc import Mapping
from typing import Any

from cnnjepa.probes import _draws
from cnnjepa.probes.features import ProbeData


def metrics(probes: Mapping[str, Any]) -> list[str]:
    """Return the names of the scores under these settings."""
    names = _draws.score_names(probes["few_shot_draws"])
    return ["draws", *[f"shots{count}_{name}" for count in probes["few_shot_images"] for name in names]]


def run(data: ProbeData) -> dict[str, float]:
    """Return shots1_test_top1 and so on, means in percent, and shots1_test_spread, their standard deviation over the draws.

    Raise ValueError if a class has too few images, or features are not finite.
    """
    data.require_finite()
    probes, images = data.config.probes, _draws.counts(data.fit.labels_N)
    label, least = min(images.items(), key=lambda of: of[1])
    if least < max(probes.few_shot_images):
        most = max(probes.few_shot_images)
        rule = f"be at most {least}, the labelled training images of class {label}"
        raise ValueError(f"probes.few_shot_images must {rule}; got {most}")
    found = {"draws": float(probes.few_shot_draws)}
    for count in probes.few_shot_images:
        scores = _draws.over_draws(data, dict.fromkeys(images, count), probes.few_shot_draws)
        found |= {f"shots{count}_{name}": value for name, value in scores.items()}
    return found
