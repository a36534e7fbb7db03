"""Probe frozen features. Each file but features.py and _logistic.py has `run(data) -> metrics`."""

import importlib
import logging
import math
import traceback
from collections.abc import Iterable

from torch import nn

from cnnjepa.config import TrainConfig
from cnnjepa.data.datasets import Splits
from cnnjepa.probes.features import FeatureError, probe_data
from cnnjepa.run.ranks import Ranks, broadcast_object

log = logging.getLogger(__name__)


def images_behind(metrics: Iterable[str], splits: Splits) -> dict[str, int]:
    """Return how many images each score rests on, by metric."""
    counts = {"holdout": len(splits.holdout), "test": len(splits.test), "paper_protocol": len(splits.test)}
    parts = {metric: metric.partition(".")[2].rpartition("_top") for metric in metrics}
    return {metric: counts[part] for metric, (part, score, _) in parts.items() if score}


def run_probes(
    encoder: nn.Module, config: TrainConfig, splits: Splits, ranks: Ranks, final: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Return metrics named <probe>.<metric>, and causes of missing ones, alike on every rank."""
    try:
        data = probe_data(encoder, config, splits, ranks, final)
    except FeatureError as error:
        return {}, {name: str(error) for name in config.probes.names}
    metrics: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name in config.probes.names if data is not None else ():
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
    return broadcast_object((metrics, missing), ranks)
