"""CNNs of timm through `visible` against themselves without a mask, forward and backward, in turn in one process.

    python tests/benchmarks/visible.py [--json] [--models resnet18 resnet50 ...] [--fractions 0.25 0.4 0.6] [--batch 16] [--size 224]
                                       [--dtypes fp32] [--threads 1] [--rounds 7]

`dense` is the network's own pass up to its last feature map, in channels-last memory and in training mode. Masks are random, with the same
number of visible cells in each image; each round has new ones. Figures are medians of the rounds' ratios, and the smallest and the largest.
Seconds are processor seconds on one thread, else the clock's. `over_limit` is the ratio over the visible fraction: 1 would be a network
that pays for nothing but what is visible.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from _report import publish
from _turns import AUTOCAST, exact_masks, in_turn, ratio, spread
from rich.table import Table
from torch import Tensor

from cnnjepa.models import visible

LIMIT = 1.15  # of the visible fraction, for the networks of `HELD`
HELD = ("resnet18", "resnet50")
MODELS = (
    *("resnet18", "resnet50", "resnet50d", "wide_resnet50_2", "resnext50_32x4d", "seresnet50", "resnet50_gn", "regnety_002"),
    *("mobilenetv2_100", "efficientnet_b0", "densenet121", "convnext_atto", "convnext_tiny", "vgg11_bn"),
)


class Bench:
    """One network and one batch of images."""

    def __init__(self, asked: argparse.Namespace, name: str, dtype: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.name, self.dtype, self.batch = name, dtype, asked.batch
        torch.manual_seed(0)
        self.model: Any = timm.create_model(name, num_classes=0).to(self.device, memory_format=torch.channels_last).train()
        self.net = visible(self.model)
        images = torch.randn(asked.batch, 3, asked.size, asked.size, generator=torch.Generator().manual_seed(0))
        self.images = images.to(self.device, memory_format=torch.channels_last)
        self.grid = asked.size // self.net.cell

    def both(self, features: Callable[[], Tensor]) -> Callable[[], None]:
        """Forward, backward, and the gradients let go."""

        def run() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=AUTOCAST[self.dtype]):
                out = features()
            out.float().square().mean().backward()
            self.model.zero_grad()

        return run

    def measure(self, fraction: float, rounds: int) -> dict[str, Any]:
        """Ratios at one visible fraction."""
        seen = exact_masks(fraction, 0, 1, self.grid).float().mean().item()

        def ways(turn: int) -> dict[str, Callable[[], None]]:
            mask = exact_masks(fraction, turn, self.batch, self.grid)
            return {
                "visible": self.both(lambda: self.net(self.images, mask)),
                "dense": self.both(lambda: self.model.forward_features(self.images)),
            }

        times = in_turn(ways, rounds, self.device)
        return {
            "model": self.name,
            "dtype": self.dtype,
            "visible": seen,
            "over_dense": ratio(times, "visible", "dense"),
            "over_dense_range": spread(times, "visible", "dense"),
            "over_limit": ratio(times, "visible", "dense") / seen,
            "seconds": {name: statistics.median(t) for name, t in times.items()},
        }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.4])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtypes", choices=AUTOCAST, nargs="+", default=["fp32"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = []
    for name in asked.models:
        for dtype in asked.dtypes:
            bench = Bench(asked, name, dtype)
            rows += [bench.measure(fraction, asked.rounds) for fraction in asked.fractions]
    held = [r["over_limit"] for r in rows if r["model"] in HELD and r["dtype"] == "fp32"]
    figures = {"batch": asked.batch, "size": asked.size, "threads": asked.threads, "limit": LIMIT, "rows": rows}
    if held:
        figures |= {"largest_over_limit": max(held), "within_limit": max(held) <= LIMIT}
    table = Table("model", "dtype", "visible", "visible/dense", "range", "over limit", "seconds: visible, dense")
    for r in rows:
        numbers = [f"{r['visible']:.2f}", f"{r['over_dense']:.3f}", "-".join(f"{x:.2f}" for x in r["over_dense_range"])]
        seconds = ", ".join(f"{r['seconds'][way]:.2f}" for way in ("visible", "dense"))
        table.add_row(r["model"], r["dtype"], *numbers, f"{r['over_limit']:.2f}", seconds)
    publish(asked.json, asked.rounds, figures, table, [f"{asked.threads} threads, batch {asked.batch}, {asked.size} px"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
