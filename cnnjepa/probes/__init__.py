"""Probe frozen features. Each file but features.py and _logistic.py has `run(data) -> metrics`."""

import importlib
import logging
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import nn

from cnnjepa.config import TrainConfig, own_probes
from cnnjepa.data.datasets import Splits, load_other
from cnnjepa.data_config import other_set
from cnnjepa.probes.features import FeatureError, probe_data
from cnnjepa.run.ranks import Ranks, broadcast_object, first_of

log = logging.getLogger(__name__)
V = TypeVar("V")


@dataclass(frozen=True)
class Outcome:
    """Hold metrics named <probe>.<metric>, causes of missing ones by probe, and the images behind each score."""

    metrics: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)  # score -> its expected value if the classes are guessed

    def __or__(self, other: "Outcome") -> "Outcome":
        """Return both together."""
        return Outcome(*(mine | its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))


def run_probes(
    encoder: nn.Module, config: TrainConfig, splits: Splits, ranks: Ranks, final: bool, wanted: Mapping[str, Sequence[str]] | None = None
) -> Outcome:
    """Run the probes on rank 0 and return their outcome, alike on every rank.

    If `final`, they also run on the sets of `probes.data`, as <probe>.<set>.<metric>. `wanted`
    chooses probes by the name of the set, where "" is the run's own.
    """
    names = config.probes.names
    found = probes_on(encoder, config, splits, ranks, final, own_probes(config) if wanted is None else wanted.get("", ()))
    for entry in config.probes.data if final else ():
        chosen = names if wanted is None else wanted.get(entry.partition(":")[0], ())
        found |= probes_on_other(encoder, config, entry, ranks, chosen)
    return found


def probes_on(encoder: nn.Module, config: TrainConfig, splits: Splits, ranks: Ranks, final: bool, names: Sequence[str]) -> Outcome:
    """Return the outcome of the probes `names` on the run's own set."""
    if not names:
        return Outcome()
    try:
        data = probe_data(encoder, config, splits, ranks, final)
    except FeatureError as error:
        return Outcome(missing={name: str(error) for name in names})
    metrics: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in names if data is not None else ():
        try:
            values = importlib.import_module(f"cnnjepa.probes.{name}").run(data)
            broken = [k for k, v in values.items() if not math.isfinite(v)]
            if broken:
                raise ValueError(f"{broken[0]} is not finite")
            metrics |= {f"{name}.{k}": v for k, v in values.items()}
        except Exception as error:
            # Any fault of a probe is a missing value with its cause; the pretraining remains valid.
            log.warning("%s", traceback.format_exc())
            missing[name] = f"{type(error).__name__}: {error}"
    counts = {"holdout": len(splits.holdout), "test": len(splits.test), "paper_protocol": len(splits.test)}
    parts = {metric: metric.partition(".")[2].rpartition("_top") for metric in metrics}
    images = {metric: counts[part] for metric, (part, score, _) in parts.items() if score}
    chance = {metric: min(100 * int(k) / splits.dataset.classes, 100.0) for metric, (_, score, k) in parts.items() if score}
    return broadcast_object(Outcome(metrics, missing, images, chance), ranks)


def probes_on_other(encoder: nn.Module, config: TrainConfig, entry: str, ranks: Ranks, names: Sequence[str]) -> Outcome:
    """Return the outcome of the probes `names` on another labelled set, an entry of `probes.data`.

    Its images are resized to the run's size, and normalised by that set's own mean and deviation.
    """
    if not names:
        return Outcome()
    called, cause = entry.partition(":")[0], ""
    splits: Splits | None = None
    try:
        splits = load_other(entry, config.data)
    except Exception as error:  # missing on this rank's node, for example: all ranks are told
        cause = f"{type(error).__name__}: {error}"
    if (first := first_of(cause, ranks)) or splits is None:
        return Outcome(missing={f"{name}.{called}": first for name in names})
    config = replace(config, data=other_set(entry, config.data))
    found = probes_on(encoder, config, splits, ranks, True, names)

    def named(values: dict[str, V]) -> dict[str, V]:
        return {".".join([name, called, *rest]): value for (name, *rest), value in ((key.split("."), v) for key, v in values.items())}

    return Outcome(named(found.metrics), named(found.missing), named(found.images), named(found.chance))
