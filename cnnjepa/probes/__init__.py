"""Probe frozen features. Each file but features.py defines `run(data) -> metrics`."""

import importlib
import logging
import math
import traceback
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from cnnjepa.config import TrainConfig, other_set
from cnnjepa.data.datasets import Splits, load_other
from cnnjepa.probes.features import FeatureError, probe_data
from cnnjepa.run.ranks import Ranks, broadcast_object, first_of

log = logging.getLogger(__name__)
# Metrics, and the cause of each probe without a value.
Outcome = tuple[dict[str, float], dict[str, str]]


def run_probes(encoder: nn.Module, config: TrainConfig, splits: Splits, ranks: Ranks, final: bool) -> Outcome:
    """Return metrics named <probe>.<metric>, and the cause of each probe without a value.

    If `final`, the probes also run on the sets of `probes.data`, as <probe>.<set>.<metric>. Both
    are computed on rank 0 and are the same on every rank.
    """
    metrics, missing = probes_on(encoder, config, splits, ranks, final, config.probes.names)
    for entry in config.probes.data if final else ():
        more, without = probes_on_other(encoder, config, entry, ranks, config.probes.names)
        metrics, missing = metrics | more, missing | without
    return metrics, missing


def probes_on(encoder: nn.Module, config: TrainConfig, splits: Splits, ranks: Ranks, final: bool, names: Sequence[str]) -> Outcome:
    """Return the outcome of the probes `names` on the run's own set."""
    if not names:
        return {}, {}
    try:
        data = probe_data(encoder, config, splits, ranks, final)
    except FeatureError as error:
        return {}, {name: str(error) for name in names}
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
    return broadcast_object((metrics, missing), ranks)


def probes_on_other(encoder: nn.Module, config: TrainConfig, entry: str, ranks: Ranks, names: Sequence[str]) -> Outcome:
    """Return the outcome of the probes `names` on another labelled set, an entry of `probes.data`.

    Its images are resized to the run's size, and normalised by that set's own mean and deviation.
    """
    called, cause = entry.partition(":")[0], ""
    splits: Splits | None = None
    try:
        splits = load_other(entry, config.data)
    except Exception as error:  # missing on this rank's node, for example: all ranks are told
        cause = f"{type(error).__name__}: {error}"
    if (first := first_of(cause, ranks)) or splits is None:
        return {}, {f"{name}.{called}": first for name in names}
    config = replace(config, data=other_set(entry, config.data))
    metrics, missing = probes_on(encoder, config, splits, ranks, True, names)
    return (
        {f"{name}.{called}.{rest}": value for (name, _, rest), value in ((key.partition("."), v) for key, v in metrics.items())},
        {f"{name}.{called}": cause for name, cause in missing.items()},
    )
