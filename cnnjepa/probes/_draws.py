"""Scores of a linear classifier that few labels teach, over several draws of the labelled images.

The draws depend on their number alone: all runs on one set are taught by the same images.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cnnjepa.probes.features import Features, ProbeData
from cnnjepa.probes.linear import Classifier
from cnnjepa.randomness import Stream, generator


def drawn(labels_N: Tensor, sizes: Mapping[int, int], draw: int) -> Tensor:
    """Return the sorted positions of `sizes[class]` images of each class.

    A larger size adds images to those of a smaller one in the same draw.
    """
    labels = labels_N.cpu().numpy()
    order = generator(draw, Stream.probe, 1).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # by class, at random within it
    first = np.searchsorted(labels[order], list(sizes))
    chosen = [order[start : start + size] for start, size in zip(first, sizes.values(), strict=True)]
    return torch.from_numpy(np.sort(np.concatenate(chosen))).to(labels_N.device)


def taught(data: ProbeData, images: Tensor) -> dict[str, float]:
    """Return holdout_top1 and so on of the converged classifier of the images at these positions of `fit`."""
    few = Features(data.fit.features_NC[images], data.fit.labels_N[images])
    classifier, scores = Classifier.of(data, few), dict[str, float]()
    for name, part in data.judged().items():
        scores |= {f"{name}_{k}": v for k, v in classifier.accuracy(part).items()}
    return scores


def over_draws(data: ProbeData, sizes: Mapping[int, int], draws: int) -> dict[str, float]:
    """Return the mean of each score over draws, and <part>_spread, the standard deviation of its top-1 in points."""
    each = [taught(data, drawn(data.fit.labels_N, sizes, draw)) for draw in range(draws)]
    found = {name: float(np.mean([scores[name] for scores in each])) for name in each[0]}
    if draws > 1:
        tops = [name for name in found if name.endswith("_top1")]
        found |= {name.replace("_top1", "_spread"): float(np.std([scores[name] for scores in each], ddof=1)) for name in tops}
    return found


def score_names(draws: int) -> list[str]:
    """Return the names of what `over_draws` returns."""
    return [f"{part}_{score}" for part in ("holdout", "test") for score in ["top1", "top5", *["spread"] * (draws > 1)]]


def counts(labels_N: Tensor) -> dict[int, int]:
    """Return the images of each class."""
    values, images = labels_N.unique(return_counts=True)
    return dict(zip(values.tolist(), images.tolist(), strict=True))
