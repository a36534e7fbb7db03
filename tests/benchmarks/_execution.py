"""Whether tiled and masked execution agree on a device, and whether a training of a few steps repeats and resumes there.

Agreement is that of features, all gradients and running statistics in float64, the largest difference over the largest value of each tensor
(gradients at least a thousandth of the largest gradient, since some are sums that cancel), for several kinds of masks. A run is three
trainings of 6 steps: twice alike, and once broken off after 3 and restored.
"""

import copy
import math
from typing import Any

import numpy as np
import torch
from _turns import exact_masks, real_masks
from torch import Tensor

from cnnjepa.batch import Batch
from cnnjepa.config import EncoderConfig, EncoderName, Execution, TrainConfig
from cnnjepa.data_config import DataConfig
from cnnjepa.methods.cnn_jepa import Config, Method
from cnnjepa.models.masked import Visibility
from cnnjepa.models.resnet import FEWEST_CELLS, ResNet, build_encoder
from cnnjepa.optim import build_optimizer

TOLERANCE = 1e-9
STEPS, BATCH = 6, 8
COLUMNS = ("features", "gradients", "statistics", "run again", "resumed")


def masks(batch: int, grid: int) -> dict[str, Tensor]:
    """[B, h, w] each: the paper's, half of all, one cell an image, all but one, and unequal counts with an image that sees nothing."""
    one = torch.zeros(batch, grid, grid, dtype=torch.bool)
    one.view(batch, -1)[torch.arange(batch), torch.arange(batch) * 3 % grid**2] = True
    unequal = torch.rand(batch, grid, grid, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 1, batch)[:, None, None]
    return {
        "mixed": real_masks(0, batch, grid),
        "half": exact_masks(0.5, 0, batch, grid),
        "one cell each": one,
        "all but one each": ~one,
        "unequal": unequal,
    }


def apart(a: Tensor, b: Tensor, at_least: float = 0.0) -> float:
    """The largest difference over the largest value; infinite where either is not finite."""
    found = ((a - b).abs().max() / max(b.abs().max().item(), at_least)).item()
    return found if math.isfinite(found) else math.inf


def execution_apart(name: EncoderName, visible: Tensor, device: torch.device) -> dict[str, float]:
    """How far tiled and masked execution are apart, by kind of tensor."""
    tiled: ResNet = build_encoder(EncoderConfig(name), 0).double().to(device, memory_format=torch.channels_last).train()
    with torch.no_grad():
        for block in tiled.blocks():  # a new block is the identity, and its branch would have no gradient
            block.branch[-1][1].weight.fill_(0.5)
    masked = copy.deepcopy(tiled)
    masked.execution = Execution.masked
    b, h, w = visible.shape
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(b, 3, h * tiled.cell, w * tiled.cell, dtype=torch.float64, generator=generator).to(device)
    features, expected = (net(images, Visibility(visible, device)) for net in (tiled, masked))
    weights = torch.randn(features.shape, dtype=torch.float64, generator=generator).to(device)
    for out in (features, expected):
        (out * weights).sum().backward()
    gradients = [(p.grad, q.grad) for p, q in zip(tiled.parameters(), masked.parameters(), strict=True)]
    largest = max(q.abs().max().item() for _, q in gradients)
    return {
        "features": apart(features, expected),
        "gradients": max(apart(p, q, 1e-3 * largest) for p, q in gradients),
        "statistics": max(apart(a.double(), c.double()) for a, c in zip(tiled.buffers(), masked.buffers(), strict=True)),
    }


class Training:
    """A method and its optimiser, step by step."""

    def __init__(self, encoder: EncoderName, size: int, device: torch.device) -> None:
        self.device = device
        config = TrainConfig(method=Config(), encoder=EncoderConfig(encoder), data=DataConfig(image_size=size), seed=1)
        self.method = Method(config, total_steps=STEPS).to(device, memory_format=torch.channels_last).train()
        self.parameters = [p for p in self.method.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(config.optimizer, self.parameters)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(BATCH, 3, size, size, generator=generator).to(device, memory_format=torch.channels_last)

    def run(self, first: int, end: int) -> "Training":
        """Steps `first` to `end` in bf16."""
        for step in range(first, end):
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.method(Batch([self.images], step, np.arange(BATCH)))["loss"]
            loss.backward()
            self.optimizer.step()
            self.method.after_step(step)
        return self

    def apart(self, other: "Training") -> float:
        """The largest difference of any weight over the largest value of its tensor."""
        pairs = zip(self.method.state_dict().values(), other.method.state_dict().values(), strict=True)
        return max(apart(a.double(), b.double(), 1e-30) for a, b in pairs)


def runs_apart(encoder: EncoderName, device: torch.device) -> dict[str, float]:
    """Weights after 6 steps: of two runs alike, and of one that was broken off and restored."""
    size = 64 if encoder is EncoderName.resnet_small else 224
    whole, again, first = (Training(encoder, size, device).run(0, end) for end in (STEPS, STEPS, 3))
    resumed = Training(encoder, size, device)
    resumed.method.load_state_dict(copy.deepcopy(first.method.state_dict()))
    resumed.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    return {"run again": whole.apart(again), "resumed": whole.apart(resumed.run(3, STEPS))}


def execution(encoders: list[str], device: torch.device) -> dict[str, Any]:
    """{"worst_apart", "rows"}: a row for each kind of mask, and one for the runs."""
    FEWEST_CELLS.clear()  # the masks here are small
    rows: list[dict[str, Any]] = []
    for encoder in (EncoderName[n] for n in encoders):
        rows += [{"encoder": encoder.name, "of": kind, **execution_apart(encoder, m, device)} for kind, m in masks(5, 4).items()]
        rows.append({"encoder": encoder.name, "of": "6 steps, bf16", **runs_apart(encoder, device)})
    return {"worst_apart": max(r[k] for r in rows for k in COLUMNS[:3] if k in r), "rows": rows}
