"""The one feature pass that all probes share: frozen encoder in eval mode, global average pool (paper, section IV-A)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cnnjepa.config import TrainConfig
from cnnjepa.data.datasets import Images, Indices, Splits
from cnnjepa.data.loader import normalise, probe_loader
from cnnjepa.distributed import Ranks, first_of, gather_rows


class FeatureError(RuntimeError):
    """The features that all probes need could not be computed."""


@dataclass
class Features:
    """Pooled features [N, C] in fp32 and their labels [N]."""

    features_NC: Tensor
    labels_N: Tensor


@dataclass
class ProbeData:
    """What a probe may read: `test` is None until the run has ended, so that no choice can look at it."""

    fit: Features
    holdout: Features
    test: Features | None
    classes: int
    config: TrainConfig

    def judged(self) -> dict[str, Features]:
        """The parts on which a score is due, by the name that its metrics carry."""
        parts = {"holdout": self.holdout}
        return parts if self.test is None else {**parts, "test": self.test}


@torch.no_grad()
def pooled_features(encoder: nn.Module, config: TrainConfig, splits: Splits, images: Images, indices: Indices, ranks: Ranks) -> Tensor:
    """This rank's share of the features of `indices`, [n, C]; ranks hold consecutive shares. The encoder's mode is put back."""
    mine = [int(b) for b in torch.linspace(0, len(indices), ranks.count + 1).round()][ranks.rank : ranks.rank + 2]
    dtype = next(encoder.parameters()).dtype
    was_training = encoder.training
    encoder.eval()
    pooled = []
    try:
        for pixels in probe_loader(config, images, indices[mine[0] : mine[1]], ranks.device):
            pooled.append(encoder(normalise(pixels, splits, ranks.device, dtype)).mean((2, 3)).float())
    finally:  # a probe that failed is a missing value: the training goes on as if it had not been
        encoder.train(was_training)
    channels: int = encoder.out_channels  # type: ignore[assignment]
    return torch.cat(pooled) if pooled else torch.empty(0, channels, device=ranks.device)


def probe_data(encoder: nn.Module, config: TrainConfig, splits: Splits, ranks: Ranks, final: bool) -> ProbeData | None:
    """The features of fit and holdout, and of test where `final`, on rank 0, None on the others; collective over ranks.

    Raises FeatureError, on every rank, where any rank could not compute its share.
    """
    data = splits.dataset
    parts = [(data.train, splits.fit), (data.train, splits.holdout)] + [(data.test, splits.test)] * final
    cause, shares = "", []
    try:
        shares = [pooled_features(encoder, config, splits, images, indices, ranks) for images, indices in parts]
    except Exception as error:  # an image that cannot be decoded, no room on the device: told to all, so that nobody waits
        cause = f"{type(error).__name__}: {error}"
    if first := first_of(cause, ranks):
        raise FeatureError(first)
    features = [
        Features(gather_rows(share, ranks), torch.from_numpy(images.labels[indices]).to(ranks.device))
        for share, (images, indices) in zip(shares, parts, strict=True)
    ]
    return ProbeData(features[0], features[1], features[2] if final else None, data.classes, config) if ranks.is_main else None


@torch.no_grad()
def calibrate_batchnorm(encoder: nn.Module, config: TrainConfig, splits: Splits, ranks: Ranks) -> None:
    """Set the running statistics to the plain average over the training images: what a random encoder needs for a fair probe."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    encoder.train()
    dtype = next(encoder.parameters()).dtype
    for pixels in probe_loader(config, splits.dataset.train, splits.pretrain, ranks.device):
        encoder(normalise(pixels, splits, ranks.device, dtype))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def topk_accuracy(scores_NK: Tensor, labels_N: Tensor, classes: int) -> dict[str, float]:
    """{"top1": percent, "top5": percent}; top5 only where there are more than 5 classes to choose from."""
    ks = [1, 5] if classes > 5 else [1]
    best = scores_NK.topk(max(ks), dim=1).indices == labels_N[:, None]
    return {f"top{k}": 100 * best[:, :k].any(1).double().mean().item() for k in ks}
