"""Fine-tune a copy of the encoder with a linear classifier, end to end, on the labelled training images.

Views are random crops and flips, as in pretraining by CNN-JEPA. AdamW takes `probes.finetune_epochs`
epochs with a linear warm-up and a cosine to zero. The last weights are scored: neither the held-out
nor the test images choose anything.
"""

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnjepa.config import OptimizerConfig, TrainConfig
from cnnjepa.data.datasets import Images, Indices, Splits
from cnnjepa.data.loader import MicroBatches, Plan, blank_batch, normalise, probe_loader, train_loader
from cnnjepa.data.views import crop_and_flip
from cnnjepa.distributed import GradientBuckets, RunningStatistics, gather_rows
from cnnjepa.models.encoders import build_encoder
from cnnjepa.optim import build_optimizer, set_learning_rate
from cnnjepa.probes._evaluation import EvaluationError, Kept
from cnnjepa.probes.features import ProbeData, in_bf16, shares, topk_accuracy
from cnnjepa.randomness import Stream, integer
from cnnjepa.run.folder import line_of
from cnnjepa.run.ranks import Ranks, broadcast_object, first_of
from cnnjepa.schedules import learning_rate

log = logging.getLogger(__name__)
_LOOK_STEPS = 20  # between two looks whether to save or stop


def metrics(probes: Mapping[str, Any]) -> list[str]:
    """Return the names of the scores."""
    return [f"{part}_{score}" for part in ("holdout", "test") for score in ("top1", "top5")] + ["train_loss"]


def plan_of(config: TrainConfig, splits: Splits, ranks: int) -> Plan:
    """Return the steps: whole batches over all ranks, as large as asked for where there are so many images."""
    rows = max(min(config.probes.finetune_batch_size, len(splits.fit)) // ranks, 1)
    if rows * ranks > len(splits.fit):
        raise EvaluationError(f"fine-tuning needs at least an image for each rank; got {len(splits.fit)} labelled images on {ranks}")
    return Plan(len(splits.fit), rows * ranks, rows, 1, config.probes.finetune_epochs, config.seed)


class _Net(nn.Module):
    """Encoder, average over cells, classifier."""

    def __init__(self, encoder: nn.Module, config: TrainConfig, classes: int, seed: int) -> None:
        super().__init__()
        new = build_encoder(config.encoder, config.data.image_size, 0, config.data.channels)
        fixed = {name for name, parameter in new.named_parameters() if not parameter.requires_grad}  # positions of a ViT
        self.encoder = copy.deepcopy(encoder)
        weight = next(self.encoder.parameters())
        channels: int = encoder.out_channels  # type: ignore[assignment]
        self.classifier = nn.Linear(channels, classes)
        with torch.no_grad():
            bound = channels**-0.5
            self.classifier.weight.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
            self.classifier.bias.zero_()
        self.classifier.to(weight.device, weight.dtype)
        for name, parameter in self.named_parameters():  # a teacher's are all off
            parameter.requires_grad_(name.removeprefix("encoder.") not in fixed)
        for module in self.modules():
            if hasattr(module, "sync"):
                module.sync = config.encoder.sync_bn  # type: ignore[assignment]

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return scores [B, classes]."""
        scores: Tensor = self.classifier(self.encoder(images_BCHW).mean((2, 3)))
        return scores


def run_on(encoder: nn.Module, config: TrainConfig, splits: Splits, data: ProbeData | None, ranks: Ranks, kept: Kept) -> dict[str, float]:
    """Return holdout_top1, test_top1 and so on in percent, and the mean loss of the last epoch.

    Call this on all ranks. Raise EvaluationError on all of them where the loss is not finite.
    """
    probes, plan = config.probes, plan_of(config, splits, ranks.count)
    net = _Net(encoder, config, splits.dataset.classes, integer(config.seed, Stream.probe, 4))
    optimizing = OptimizerConfig(
        lr=probes.finetune_lr,
        weight_decay=probes.finetune_weight_decay,
        warmup_epochs=probes.finetune_warmup_epochs,
        final_lr_fraction=0.0,
        decay_norms_and_biases=False,
    )
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer, buckets = build_optimizer(optimizing, parameters), GradientBuckets(parameters, ranks)
    statistics = RunningStatistics(net, ranks)
    step, losses = 0, list[float]()
    if (begun := kept.state()) is not None:
        net.load_state_dict(begun["net"])
        optimizer.load_state_dict(begun["optimizer"])
        step, losses = int(begun["step"]), [float(loss) for loss in begun["losses"]]
        log.warning("fine-tuning goes on at step %d of %d", step, plan.total_steps)
    views = [crop_and_flip(config.data)]
    labelled = replace(splits, pretrain=splits.fit)
    loader = MicroBatches(train_loader(config, labelled, views, plan, ranks, step), blank_batch(splits, views, plan), ranks)
    net.train()
    while step < plan.total_steps:
        pixels, labels = next(loader)
        set_learning_rate(optimizer, learning_rate(optimizing, step, plan.steps_per_epoch, plan.total_steps))
        optimizer.zero_grad()
        statistics.start_step()
        buckets.arm()
        with in_bf16(config, ranks.device):
            scores = net(normalise(pixels[0], splits, ranks.device, next(net.parameters()).dtype))
        # A rank that could not load has no label: its black images teach nothing.
        loss = F.cross_entropy(scores.float(), labels.to(ranks.device), ignore_index=-1, reduction="sum") / len(labels)
        loss.backward()
        statistics.end_step()
        mean, failed = buckets.finish(torch.stack([loss.detach(), loss.new_tensor(float(loader.failed))])).tolist()
        if failed:
            try:
                loader.raise_fault()
            except Exception as error:  # on all ranks
                raise EvaluationError(line_of(error)) from error
        if not math.isfinite(mean):
            raise EvaluationError(
                f"the loss of fine-tuning is not finite at step {step}: lower probes.finetune_lr, now {probes.finetune_lr:g}"
            )
        optimizer.step()
        step += 1
        losses = [*losses, mean] if (step - 1) % plan.steps_per_epoch else [mean]
        if step % _LOOK_STEPS == 0 or step == plan.total_steps:
            kept.go_on({"step": step, "losses": losses}, lambda: {"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    found = {"train_loss": sum(losses) / len(losses)}
    for name, images, indices in (("holdout", splits.dataset.train, splits.holdout), ("test", splits.dataset.test, splits.test)):
        found |= {f"{name}_{k}": v for k, v in _scores(net, config, splits, images, indices, ranks).items()}
    return found


@torch.no_grad()
def _scores(net: _Net, config: TrainConfig, splits: Splits, images: Images, indices: Indices, ranks: Ranks) -> dict[str, float]:
    """Return top-1 and top-5 of these images, on all ranks."""
    net.eval()
    rows, cause = [torch.empty(0, splits.dataset.classes, device=ranks.device)], ""
    try:
        first, last = shares(len(indices), ranks)
        for pixels in probe_loader(config, images, indices[first:last], ranks.device):
            with in_bf16(config, ranks.device):
                rows.append(net(normalise(pixels, splits, ranks.device, next(net.parameters()).dtype)).float())
    except Exception as error:  # an image that cannot be decoded: all ranks are told, so that none waits
        cause = f"{type(error).__name__}: {error}"
    if told := first_of(cause, ranks):
        raise EvaluationError(told)
    scores = gather_rows(torch.cat(rows), ranks)
    labels = torch.from_numpy(images.labels[indices]).to(ranks.device)
    found: dict[str, float] = {}
    try:
        if ranks.is_main:
            found = topk_accuracy(scores, labels, splits.dataset.classes)
    except Exception as error:
        cause = line_of(error)
    if told := first_of(cause, ranks):
        raise EvaluationError(told)
    return broadcast_object(found, ranks)
