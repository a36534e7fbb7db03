"""Compute the features of all probes: eval mode, average-pooled (paper, section IV-A)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnnjepa.config import Precision, TrainConfig
from cnnjepa.data.datasets import Images, Indices, Splits
from cnnjepa.data.faults import raise_alike
from cnnjepa.data.loader import normalise, probe_loader
from cnnjepa.distributed import gather_rows
from cnnjepa.run.folder import line_of
from cnnjepa.run.ranks import Ranks, first_of


class FeatureError(RuntimeError):
    """Raised when the features that all probes need cannot be computed."""


@dataclass
class Features:
    """Pooled features [N, C] in fp32 and their labels [N]."""

    features_NC: Tensor
    labels_N: Tensor


@dataclass
class ProbeData:
    """Data that a probe may read. `test` is None until the end, so that no choice depends on it."""

    fit: Features
    holdout: Features
    test: Features | None
    classes: int
    config: TrainConfig

    def judged(self) -> dict[str, Features]:
        """Return the parts to score, by the name that prefixes their metrics."""
        parts = {"holdout": self.holdout}
        return parts if self.test is None else {**parts, "test": self.test}

    def require_finite(self) -> None:
        """Raise ValueError where a feature is not finite."""
        if not all(part.features_NC.isfinite().all() for part in (self.fit, *self.judged().values())):
            raise ValueError("features are not finite")


def in_bf16(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Return autocast to bf16 for a feature pass on a GPU, if the run trains in it; on a CPU features stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and config.precision is Precision.bf16)


def shares(count: int, ranks: Ranks) -> tuple[int, int]:
    """Return the first of this rank's consecutive share of `count` images, and the one after its last."""
    first, last = [int(b) for b in torch.linspace(0, count, ranks.count + 1).round()][ranks.rank : ranks.rank + 2]
    return first, last


Change = Callable[[Tensor, list[int]], Tensor]  # uint8 views [B, C, S, S] and their positions to other such views


@torch.no_grad()
def pooled_features(
    encoder: nn.Module,
    config: TrainConfig,
    splits: Splits,
    images: Images,
    indices: Indices,
    ranks: Ranks,
    change: Change = lambda pixels, _positions: pixels,
) -> Tensor:
    """Return this rank's consecutive share of the pooled features of `indices`, fp32 [n, C], of views that `change` makes of theirs."""
    first, last = shares(len(indices), ranks)
    dtype = next(encoder.parameters()).dtype
    was_training = encoder.training
    encoder.eval()
    pooled = []
    try:
        for pixels in probe_loader(config, images, indices[first:last], ranks.device):
            changed = change(pixels, list(range(first, first + len(pixels))))
            first += len(pixels)
            with in_bf16(config, ranks.device):
                features = encoder(normalise(changed, splits, ranks.device, dtype))
            pooled.append(features.mean((2, 3), dtype=torch.promote_types(features.dtype, torch.float32)).float())
    finally:  # a failed probe is a missing value: the training continues unaffected
        encoder.train(was_training)
    channels: int = encoder.out_channels  # type: ignore[assignment]
    return torch.cat(pooled) if pooled else torch.empty(0, channels, device=ranks.device)


def probe_data(encoder: nn.Module, config: TrainConfig, splits: Splits, ranks: Ranks, final: bool) -> ProbeData | None:
    """Return the features of fit and holdout, and of test if `final`; None except on rank 0.

    Call this on all ranks. Raise FeatureError on all ranks if any could not compute its share.
    """
    data = splits.dataset
    parts = [(data.train, splits.fit), (data.train, splits.holdout)] + [(data.test, splits.test)] * final
    cause, found = "", []
    try:
        found = [pooled_features(encoder, config, splits, images, indices, ranks) for images, indices in parts]
    except Exception as error:
        # An undecodable image, or no room on the device. All ranks are told, so that none waits.
        cause = line_of(error)
    if first := first_of(cause, ranks):
        raise FeatureError(first)
    features = [
        Features(gather_rows(share, ranks), torch.from_numpy(images.labels[indices]).to(ranks.device))
        for share, (images, indices) in zip(found, parts, strict=True)
    ]
    return ProbeData(features[0], features[1], features[2] if final else None, data.classes, config) if ranks.is_main else None


@torch.no_grad()
def calibrate_batchnorm(encoder: nn.Module, config: TrainConfig, splits: Splits, ranks: Ranks) -> None:
    """Set the running statistics to the plain average over the training images.

    A random encoder needs this for a fair probe. Each rank reads all images; call this on all ranks.
    Raise on all of them the error that any has.
    """
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return  # no image is decoded for nothing
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    encoder.train()
    dtype = next(encoder.parameters()).dtype
    fault: Exception | None = None
    try:
        for pixels in probe_loader(config, splits.dataset.train, splits.pretrain, ranks.device):
            with in_bf16(config, ranks.device):
                encoder(normalise(pixels, splits, ranks.device, dtype))
    except Exception as error:
        fault = error
    raise_alike(fault, ranks)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def topk_accuracy(scores_NK: Tensor, labels_N: Tensor, classes: int) -> dict[str, float]:
    """Return {"top1": percent, "top5": percent}; top5 only if there are more than 5 classes.

    A class with a score of minus infinity is never a guess.
    """
    ks = [1, 5] if classes > 5 else [1]
    found = scores_NK.topk(max(ks), dim=1)
    best = (found.indices == labels_N[:, None]) & (found.values > -torch.inf)
    return {f"top{k}": 100 * best[:, :k].any(1).double().mean().item() for k in ks}
