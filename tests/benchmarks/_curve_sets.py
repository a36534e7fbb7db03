"""The sets of recorded learning curves that tests/benchmarks/search.py replays: what was trained, and what a search may choose.

`digits` is the set on which the sampler was tuned. `fashion` is another data set and another method, of which nothing was tuned.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sweeps.spec.space import Dimension, Params, choice, real

Value = float | str
Configuration = tuple[Value, ...]
METRIC = "linear.holdout_top1"
_ALIKE = [
    "encoder.width=8",
    "optimizer.warmup_epochs=1",
    "global_batch_size=64",
    "micro_batch_size=64",
    "probes.names=[linear]",
    "probes.linear_paper_epochs=1",
    "checkpoint.every_minutes=1000",
    "log.tensorboard=false",
    "log.images_every_epochs=0",
]


def as_is(value: Value) -> float:
    """Distances of this dimension are those of its values."""
    return float(value)


def log(value: Value) -> float:
    """Distances of this dimension are ratios of its values."""
    return math.log(float(value))


def log_below_1(value: Value) -> float:
    """Distances of this dimension are ratios of what is missing to 1."""
    return math.log(1 - float(value))


@dataclass(frozen=True)
class CurveSet:
    """A grid of configurations, trained over several seeds, with a probe at some epochs and at the end."""

    name: str
    base: Sequence[str]
    grid: Mapping[str, Sequence[Value]]
    scales: Mapping[str, Callable[[Value], float]]  # of the dimensions that are numbers
    space: Sequence[Dimension]  # what a replayed search chooses from
    epochs: int = 27
    probed: tuple[int, ...] = (2, 3, 6, 9, 13)
    seeds: tuple[int, ...] = (42, 43, 44)

    @property
    def file(self) -> Path:
        """The curves on disk."""
        return Path(__file__).resolve().parent / ("curves.json" if self.name == "digits" else f"curves_{self.name}.json")

    @property
    def overrides(self) -> list[str]:
        """What all runs have in common."""
        return [*self.base, *_ALIKE, f"epochs={self.epochs}"]

    def nearest(self, params: Params) -> Configuration:
        """The recorded configuration nearest to a chosen one, in the scale of each dimension."""
        found: list[Value] = []
        for key, values in self.grid.items():
            scale, chosen = self.scales.get(key), params[key]
            if scale is None:
                found.append(str(chosen))
            else:
                at = scale(float(chosen))
                found.append(min(values, key=lambda value: abs(scale(value) - at)))
        return tuple(found)

    def curves(self) -> dict[str, dict[str, float]]:
        """Configuration and seed -> epoch -> percent."""
        return _curves(self.file)

    def configurations(self) -> list[Configuration]:
        """Those that were recorded, in the order of the file."""
        names = dict.fromkeys(tuple(name.split()[:-1]) for name in self.curves())
        kinds = [float if key in self.scales else str for key in self.grid]
        return [tuple(kind(word) for kind, word in zip(kinds, name, strict=True)) for name in names]


@cache
def _curves(file: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(file.read_text())["curves"]
    return found


def run_name(values: Configuration, seed: int) -> str:
    """Name one run in the file."""
    return " ".join(value if isinstance(value, str) else f"{value:g}" for value in (*values, seed))


_DIGITS: dict[str, list[Value]] = {
    "optimizer.lr": [0.001, 0.003, 0.01, 0.03],
    "method.ema.momentum_start": [0.9, 0.97, 0.99, 0.996],
    "method.mask.mask_ratio": [0.3, 0.5, 0.7, 0.9],
}
_FASHION: dict[str, list[Value]] = {
    "optimizer.lr": [0.001, 0.01, 0.1, 1.0],
    "method.temperature": [0.05, 0.2, 0.8],
    "method.augment.min_crop_scale": [0.08, 0.3, 0.7],
    "optimizer.name": ["adamw", "lars"],
}
SETS = {
    made.name: made
    for made in (
        CurveSet(
            "digits",
            ["data=digits", "data.train_limit=1200", "data.holdout_fraction=0.4", "data.test_limit=60", "method.mask.strategy=random"],
            _DIGITS,
            {"optimizer.lr": log, "method.ema.momentum_start": log_below_1, "method.mask.mask_ratio": as_is},
            [
                real("optimizer.lr", 0.001, 0.03, log=True),
                real("method.ema.momentum_start", 0.9, 0.996),
                real("method.mask.mask_ratio", 0.3, 0.9),
            ],
        ),
        CurveSet(
            "fashion",
            [
                "method=simclr",
                "method.hidden=64",
                "method.projection=32",
                "method.augment.jitter_probability=0",  # colours and blur would take most of the time
                "method.augment.grey_probability=0",
                "method.augment.blur_probability=0",
                "data=fashion_mnist",
                "data.train_limit=800",
                "data.holdout_fraction=0.5",
                "data.test_limit=60",
                "optimizer.name=adamw",
                "optimizer.lr=0.01",
                "optimizer.weight_decay=0.0001",
            ],
            _FASHION,
            {"optimizer.lr": log, "method.temperature": log, "method.augment.min_crop_scale": as_is},
            [
                real("optimizer.lr", 0.001, 1.0, log=True),
                real("method.temperature", 0.05, 0.8, log=True),
                real("method.augment.min_crop_scale", 0.08, 0.7),
                choice("optimizer.name", "adamw", "lars"),
            ],
        ),
    )
}
