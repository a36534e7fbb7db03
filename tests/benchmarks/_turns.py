"""Ways of doing the same thing, measured in turn in one process, and what a baseline of the official kind does."""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cnnjepa.mask_config import MaskConfig
from cnnjepa.masking import draw_visible
from cnnjepa.models.resnet import ResNet

AUTOCAST = {"fp32": False, "bf16": True}
_WARM = {"cpu": 1, "cuda": 15}  # CUDA's libraries load a kernel when a shape first asks for it


def seconds(do: Callable[[], None], device: torch.device) -> float:
    """Of one call: the processor's on one CPU thread, which neighbours disturb least, else the clock's."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    do()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def in_turn(ways: Callable[[int], dict[str, Callable[[], None]]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way in each of `rounds` rounds after some to warm up; `ways(round)` gives them, and their order is turned."""
    times: dict[str, list[float]] = {}
    warm = _WARM[device.type]
    for i in range(rounds + warm):
        found = list(ways(i).items())
        turn = i % len(found)
        for name, do in found[turn:] + found[:turn]:
            spent = seconds(do, device)
            if i >= warm:
                times.setdefault(name, []).append(spent)
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))


def spread(times: dict[str, list[float]], above: str, below: str) -> list[float]:
    """Smallest and largest of the rounds' ratios."""
    ratios = [a / b for a, b in zip(times[above], times[below], strict=True)]
    return [round(min(ratios), 3), round(max(ratios), 3)]


def real_masks(step: int, batch: int, grid: int) -> Tensor:
    """The paper's mixed masks of one step."""
    return torch.from_numpy(draw_visible(MaskConfig(), grid, 0, step, np.arange(batch)))


def exact_masks(fraction: float, step: int, batch: int, grid: int) -> Tensor:
    """Random masks with the same number of visible cells in each image."""
    order = torch.rand(batch, grid * grid, generator=torch.Generator().manual_seed(step)).argsort(1)
    return (order < round(fraction * grid * grid)).view(batch, grid, grid)


def official_style(net: ResNet, image_BCHW: Tensor, visible_Bhw: Tensor) -> Tensor:
    """Masked execution as the official code does it: dense convolution x mask, BatchNorm of gathered positions, each found again."""

    def upsampled(x_BCHW: Tensor) -> Tensor:
        times = x_BCHW.shape[-1] // visible_Bhw.shape[-1]
        return visible_Bhw.repeat_interleave(times, 1).repeat_interleave(times, 2)

    def conv(module: nn.Module, x_BCHW: Tensor) -> Tensor:
        y = module(x_BCHW)
        return y.mul_(upsampled(y)[:, None])

    def norm(module: nn.BatchNorm2d, x_BCHW: Tensor) -> Tensor:
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        where = upsampled(x_BCHW).nonzero(as_tuple=True)
        statistics = module.running_mean, module.running_var, module.weight, module.bias, True, module.momentum, module.eps
        y_BHWC = torch.zeros_like(x_BHWC)
        y_BHWC[where] = F.batch_norm(x_BHWC[where], *statistics)
        return y_BHWC.permute(0, 3, 1, 2)

    x = F.relu_(norm(net.bn1, conv(net.conv1, image_BCHW * upsampled(image_BCHW)[:, None])))
    if not net.small:
        x = F.max_pool2d(x, 3, 2, 1)
        x = x * upsampled(x)[:, None]
    for block in net.blocks():
        y, shortcut = x, x
        layers = [(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
        for i, (convolution, normalisation) in enumerate(layers):
            y = norm(normalisation, conv(convolution, y if i == 0 else F.relu_(y)))
        if block.downsample is not None:
            convolution, normalisation = block.downsample
            shortcut = norm(normalisation, conv(convolution, x))
        x = F.relu_(y + shortcut)
    return x


def peak_mb(do: Callable[[], None], device: torch.device) -> float:
    """MiB of tensors at the peak of `do`, those that lived before it not counted."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        do()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        do()
    with tempfile.TemporaryDirectory() as folder:
        profiled.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0)
    return max(itertools.accumulate(b for _, b in changes)) / 2**20
