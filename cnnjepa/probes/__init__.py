"""Probes of frozen features: each file but features.py defines `run(data) -> metrics`; one that raises is a missing value."""

import importlib
import logging
import math
import traceback

from torch import nn

from cnnjepa.config import TrainConfig
from cnnjepa.data.datasets import Splits
from cnnjepa.distributed import Ranks, broadcast_object
from cnnjepa.probes.features import FeatureError, probe_data

log = logging.getLogger(__name__)


def run_probes(
    encoder: nn.Module, config: TrainConfig, splits: Splits, ranks: Ranks, final: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics named <probe>.<metric>, and the cause for each probe that has none; the same on every rank, computed on rank 0."""
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
        except Exception as error:  # any fault of a probe is a missing value with its cause; the pretraining stands
            log.warning("%s", traceback.format_exc())
            missing[name] = f"{type(error).__name__}: {error}"
    return broadcast_object((metrics, missing), ranks)
