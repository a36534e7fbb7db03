"""What a training step of each method costs, and what CNN-JEPA's saves: ResNet-50, 224 pixels, the same images, one process.

    python tests/benchmarks/methods.py [--json] [--rounds 3] [--batch 16] [--precision fp32|bf16] [--threads 1] [--more]

A step is the trainer's: normalisation, forward, backward, optimiser and EMA, with each method's published head and optimiser; decoding and
augmentation are left out. The methods take turns, in an order that turns by one each round; the first round warms up and does not count. A
saving is 1 - seconds of CNN-JEPA / seconds of the other, in percent, the median over rounds; on one CPU thread they are processor seconds.
SimCLR, BYOL and VICReg take a step of the official kind too (_official_methods.py), from the same weights, whose loss must be ours:
`simclr_over_official` and the like are seconds of ours / seconds of that, the median over rounds. What it is for CNN-JEPA, step.py tells.
--more adds supervised, SparK, LeJEPA (8 views) and I-JEPA (ViT-S/14). All are in memory at once: 12 GiB at batch 16.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _official_methods import OfficialStyle
from _report import publish
from _turns import AUTOCAST, in_turn, ratio, spread
from rich.table import Table

from cnnjepa.config import EncoderConfig, EncoderName, Precision, TrainConfig, method_module, optimizer_presets
from cnnjepa.data.datasets import IMAGENET_MEAN, IMAGENET_STD, Dataset, GreyImages, Splits
from cnnjepa.data.loader import Plan
from cnnjepa.data.views import ViewSpec
from cnnjepa.data_config import DATA_PRESETS
from cnnjepa.distributed import GradientBuckets
from cnnjepa.monitoring.gpu import EnergyMeter
from cnnjepa.monitoring.memory import peak_memory_mb
from cnnjepa.optim import build_optimizer
from cnnjepa.rules import validate
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.ranks import joined
from cnnjepa.run.saver import Saver
from cnnjepa.train import forward_backward, micro_batch
from cnnjepa.training_run import Run

# Percent: GPU-hours of 200 epochs on 4 A100 (paper, table V), and the official code's step on one CPU core.
PAPER_SAVING = {"simclr": 16.9, "byol": 35.0, "vicreg": 23.8}
OFFICIAL_CPU_SAVING = {"simclr": 27.9, "byol": 48.3, "vicreg": 60.0}
METHODS, MORE = ["cnn_jepa", "simclr", "byol", "vicreg"], ["supervised", "spark", "lejepa", "ijepa"]
EPOCH_STEPS = 1000  # the step is taken in the middle of a run, whose schedules go on


def settings(name: str, batch: int, precision: Precision, threads: int) -> TrainConfig:
    """The method as published, on a batch that is one micro-batch."""
    config = TrainConfig(
        method=method_module(name).Config(),
        data=DATA_PRESETS["imagenet100"],
        encoder=EncoderConfig(EncoderName.vit_small if name == "ijepa" else EncoderName.resnet50),
        optimizer=optimizer_presets()[name],
        global_batch_size=batch,
        micro_batch_size=batch,
        precision=precision,
        threads=threads,
    )
    validate(config)
    return config


def build(config: TrainConfig, ranks: Any, images: int) -> Run:
    """A run as the trainer builds it, on no data set."""
    none = GreyImages(np.zeros((0, 1, 1), np.uint8), np.zeros(0, np.int64))
    no_indices = np.zeros(0, np.int64)
    splits = Splits(Dataset(none, none, 100, IMAGENET_MEAN, IMAGENET_STD), no_indices, no_indices, no_indices, no_indices)
    plan = Plan(images * EPOCH_STEPS, images, images, 1, config.epochs, config.seed)
    method = method_module(config.method.name).Method(config, plan.total_steps)
    method = method.to(device=ranks.device, memory_format=torch.channels_last).train()
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = build_optimizer(config.optimizer, parameters)
    buckets = GradientBuckets(parameters, ranks)
    folder, saver = RunFolder(Path()), Saver(Path(), 0, 1)
    return Run(config, folder, ranks, splits, plan, method, optimizer, parameters, buckets, EnergyMeter(None), saver)


def pixels(specs: list[ViewSpec], batch: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the loader would give: views of random pixels, every other one mirrored, and labels."""
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, generator=random)
    views = [(images.flip(3) if i % 2 else images)[..., : spec.size, : spec.size] for i, spec in enumerate(specs)]
    return views, torch.arange(batch) % 100


def take_step(run: Run, loaded: Any) -> None:
    """One optimiser step of ours."""
    run.optimizer.zero_grad()
    forward_backward(run, itertools.repeat(loaded))
    run.optimizer.step()
    run.method.after_step(run.step)
    run.step += 1


def official_of(run: Run, loaded: Any) -> Callable[[], None]:
    """One optimiser step of the official kind from the weights of `run`; raises RuntimeError unless both have the same loss."""
    official = OfficialStyle(run.config, run.method).to(run.ranks.device)
    batch = micro_batch(run, loaded, 0)
    views = [v.contiguous() for v in batch.views]
    with torch.no_grad():
        ours, theirs = run.method(batch)["loss"].item(), official.loss(*views).item()
    if not abs(ours - theirs) < 1e-3 * max(abs(ours), 1):
        raise RuntimeError(
            f"the loss of {run.config.method.name} must agree to 1e-3 in fp32; ours is {ours:g}, the official kind's {theirs:g}"
        )
    bf16 = run.config.precision is Precision.bf16
    return lambda: official.step(views, torch.autocast(run.ranks.device.type, torch.bfloat16, enabled=bf16))


def measure(names: list[str], args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, int], float]:
    """Seconds of each round's step by method and by 'official <method>', trainable parameters, and all's peak memory in MiB."""
    with joined(settings(names[0], args.batch, Precision[args.precision], args.threads).device) as ranks:
        runs = {name: build(settings(name, args.batch, Precision[args.precision], args.threads), ranks, args.batch) for name in names}
        loaded = {name: pixels(run.method.views(run.config), args.batch) for name, run in runs.items()}
        steps: dict[str, Callable[[], None]] = {}
        for name, run in runs.items():
            if name in PAPER_SAVING:
                steps[f"official {name}"] = official_of(run, loaded[name])
            steps[name] = lambda name=name: take_step(runs[name], loaded[name])  # type: ignore[misc]
        times = in_turn(lambda _: steps, args.rounds, ranks.device)
        return times, {name: sum(p.numel() for p in run.parameters) for name, run in runs.items()}, peak_memory_mb(ranks)


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to stderr either way")
    parser.add_argument("--rounds", type=int, default=3, help="that count (3)")
    parser.add_argument("--batch", type=int, default=16, help="images a step (16)")
    parser.add_argument("--precision", choices=AUTOCAST, default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--more", action="store_true", help="supervised, SparK, LeJEPA and I-JEPA too")
    args = parser.parse_args()
    if args.rounds < 1 or args.batch < 2 or args.threads < 1:
        parser.error(f"--rounds and --threads must be at least 1, --batch 2; got {args.rounds}, {args.threads} and {args.batch}")
    torch.set_num_threads(args.threads)
    names = METHODS + MORE * args.more
    seconds, parameters, peak = measure(names, args)
    ours = seconds["cnn_jepa"]
    figures: dict[str, Any] = {}
    table = Table(
        *("method", "s/step", "images/s", "trainable, M", "/ official kind", "CNN-JEPA saves", "paper, GPU", "official, CPU"),
        title="One training step",
    )
    for name in names:
        saving = 100 * statistics.median(1 - a / b for a, b in zip(ours, seconds[name], strict=True))
        middle = statistics.median(seconds[name])
        reported = f"{saving:.1f} %" if name != "cnn_jepa" else ""
        theirs = [f"{values[name]:.1f} %" if name in values else "" for values in (PAPER_SAVING, OFFICIAL_CPU_SAVING)]
        over = ""
        if (official := f"official {name}") in seconds:
            share, between = ratio(seconds, name, official), spread(seconds, name, official)
            over = f"{share:.2f}"
            figures |= {
                f"{name}_over_official": share,
                f"{name}_over_official_range": between,
                f"seconds_official_{name}": seconds[official],
            }
        table.add_row(name, f"{middle:.2f}", f"{args.batch / middle:.2f}", f"{parameters[name] / 1e6:.1f}", over, reported, *theirs)
        figures[f"seconds_{name}"] = seconds[name]
        if name != "cnn_jepa":
            figures[f"saving_{name}"] = saving
    figures |= {"batch": args.batch, "precision": args.precision, "threads": args.threads, "peak_memory_mb_all_together": peak}
    figures |= {f"saving_{n}_paper": v for n, v in PAPER_SAVING.items()}
    figures |= {f"saving_{n}_official_cpu": v for n, v in OFFICIAL_CPU_SAVING.items()}
    notes = [
        f"batch {args.batch}, {args.precision}, {args.threads} threads; the paper's batch is 128 a GPU, where a large head weighs less"
    ]
    publish(args.json, args.rounds, figures, table, notes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
