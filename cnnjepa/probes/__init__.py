"""Probe features. Each file but features.py, and those with an underscore, is a probe: `run(data) -> metrics`.

Evaluations are the probes that run at the end alone. One that needs the encoder itself has
`run_on(encoder, config, splits, data, ranks, kept) -> metrics` instead, which all ranks call.
"""

import importlib
import logging
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import nn

from cnnjepa.config import TrainConfig, own_probes
from cnnjepa.data.datasets import Splits, load_other
from cnnjepa.data_config import other_set
from cnnjepa.probe_config import EVALUATIONS
from cnnjepa.probes import robustness
from cnnjepa.probes._evaluation import Conditions, EvaluationError, Kept, kept_of
from cnnjepa.probes.collapse import collapsed
from cnnjepa.probes.features import FeatureError, ProbeData, probe_data
from cnnjepa.run.folder import EvaluationStopped
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
    hours: dict[str, float] = field(default_factory=dict)  # evaluation -> device-hours, over all its starts

    def __or__(self, other: "Outcome") -> "Outcome":
        """Return both together."""
        return Outcome(*(mine | its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))


def run_probes(
    encoder: nn.Module,
    config: TrainConfig,
    splits: Splits,
    ranks: Ranks,
    final: bool,
    wanted: Mapping[str, Sequence[str]] | None = None,
    conditions: Conditions | None = None,
) -> Outcome:
    """Run the probes on rank 0 and return their outcome, alike on every rank.

    If `final`, the evaluations run too, and all on the sets of `probes.data`, as
    <probe>.<set>.<metric>. `wanted` chooses probes by the name of the set, where "" is the run's
    own. Raise EvaluationStopped on all ranks if `conditions` ask to stop.
    """
    names, conditions = config.probes.names, conditions or Conditions()
    chosen = own_probes(config, final) if wanted is None else wanted.get("", ())
    found = probes_on(encoder, config, splits, ranks, final, chosen, conditions)
    for entry in config.probes.data if final else ():
        chosen = names if wanted is None else wanted.get(entry.partition(":")[0], ())
        found |= probes_on_other(encoder, config, entry, ranks, chosen, conditions)
    return found


def probes_on(
    encoder: nn.Module, config: TrainConfig, splits: Splits, ranks: Ranks, final: bool, names: Sequence[str], conditions: Conditions
) -> Outcome:
    """Return the outcome of the probes `names` on the run's own set."""
    if not names:
        return Outcome()
    names = sorted(names, key=lambda name: name in EVALUATIONS)  # a stable sort: what costs most comes last
    kept = kept_of([name for name in names if name in EVALUATIONS], encoder, config, conditions, ranks)
    known = {name: values for name, each in kept.items() if (values := each.values()) is not None}
    data, cause = None, ""
    if any(name not in known and name != "finetune" for name in names):  # all others need features
        try:
            data = probe_data(encoder, config, splits, ranks, final)
        except FeatureError as error:
            cause = str(error)
    found = Outcome()
    for name in names:
        began = time.perf_counter()
        metrics, why = known.get(name), "" if name in known or name == "finetune" else cause
        if metrics is None and name in kept and (gone := broadcast_object(collapsed(found.metrics, config.probes), ranks)):
            why = f"not computed, since the features have collapsed: {gone}"
        if metrics is None and not why:
            if name in kept:
                kept[name].begun = began
            metrics, why = values_of(name, encoder, config, splits, data, ranks, kept.get(name))
        if name in kept and name not in known:
            conditions.spent[name] = conditions.spent.get(name, 0.0) + time.perf_counter() - began
        if metrics is None:
            found.missing[name] = why
            continue
        if name in kept:
            if name not in known:
                metrics = {**metrics, "seconds": kept[name].seconds}
                kept[name].finish(metrics)
            found.hours[name] = device_hours(metrics["seconds"], config, ranks)
        found.metrics.update({f"{name}.{k}": v for k, v in metrics.items() if k != "seconds"})
    tested = images_tested(config, splits)
    for metric in found.metrics:
        name, _, rest = metric.partition(".")
        part, score, k = rest.rpartition("_top")
        if score:
            found.images[metric] = tested[name] if name in tested else len(splits.holdout if part.endswith("holdout") else splits.test)
            found.chance[metric] = min(100 * int(k) / splits.dataset.classes, 100.0)
    return broadcast_object(found, ranks)


def device_hours(seconds: float, config: TrainConfig, ranks: Ranks) -> float:
    """Return GPU-hours on CUDA, core-hours on CPU, as of a run."""
    return seconds / 3600 * ranks.count * (1 if ranks.device.type == "cuda" else config.threads)


def images_tested(config: TrainConfig, splits: Splits) -> dict[str, int]:
    """Return the images behind the scores of each probe that does not take all of a part."""
    return {"robustness": robustness.images(config, splits)}


def values_of(
    name: str, encoder: nn.Module, config: TrainConfig, splits: Splits, data: ProbeData | None, ranks: Ranks, kept: Kept | None
) -> tuple[dict[str, float] | None, str]:
    """Return the values of one probe, on all ranks, or None and the cause.

    Any fault of a probe is a missing value with its cause; the pretraining remains valid.
    """
    module, metrics, cause = importlib.import_module(f"cnnjepa.probes.{name}"), dict[str, float](), ""
    try:
        if hasattr(module, "run_on"):
            metrics = module.run_on(encoder, config, splits, data, ranks, kept)
        elif data is not None:
            metrics = module.run(data)
        if broken := [k for k, v in metrics.items() if not math.isfinite(v)]:
            raise ValueError(f"{broken[0]} is not finite")
    except EvaluationStopped:
        raise
    except Exception as error:
        if hasattr(module, "run_on") and ranks.count > 1 and not isinstance(error, EvaluationError):
            raise  # on this rank alone: its end tells the launcher to end the others, which wait for it
        log.warning("%s", traceback.format_exc())
        cause = f"{type(error).__name__}: {error}"
    if cause := first_of(cause, ranks):
        return None, cause
    return broadcast_object(metrics, ranks), ""


def probes_on_other(
    encoder: nn.Module, config: TrainConfig, entry: str, ranks: Ranks, names: Sequence[str], conditions: Conditions
) -> Outcome:
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
    found = probes_on(encoder, config, splits, ranks, True, names, conditions)

    def named(values: dict[str, V]) -> dict[str, V]:
        return {".".join([name, called, *rest]): value for (name, *rest), value in ((key.split("."), v) for key, v in values.items())}

    return Outcome(*(named(values) for values in vars(found).values()))
