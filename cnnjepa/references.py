"""Scores to compare a run's with: those of its encoder before any training, and those of guessing."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from cnnjepa import weights
from cnnjepa.config import TrainConfig
from cnnjepa.data.datasets import Splits
from cnnjepa.methods._base import weights_dtype
from cnnjepa.models.encoders import build_encoder
from cnnjepa.probes import Outcome, run_probes
from cnnjepa.probes._evaluation import Conditions
from cnnjepa.probes.features import calibrate_batchnorm
from cnnjepa.randomness import Stream, integer
from cnnjepa.run.files import read_json, reading, sealed_json, write_atomic
from cnnjepa.run.folder import RunFolder
from cnnjepa.run.identity import identity
from cnnjepa.run.ranks import Ranks, broadcast_object, first_of
from cnnjepa.run.typed import checked

log = logging.getLogger(__name__)
CHANCE = "chance level"
REFERENCE = "reference"  # in the costs of the run that computed the scores of the encoder before training


def references(
    config: TrainConfig,
    folder: RunFolder,
    splits: Splits,
    ranks: Ranks,
    found: Outcome,
    wanted: Mapping[str, Sequence[str]] | None = None,
    conditions: Conditions | None = None,
) -> dict[str, dict[str, float]]:
    """Return name -> the scores of `found` as guessing and, in a sweep, a random encoder have them.

    `wanted` are the probes behind `found`, as in `run_probes`. Runs of a sweep that start from the
    same encoder share its scores; the first of them to end computes them. Call this on all ranks.
    """
    guessed = {CHANCE: found.chance} if found.chance else {}
    if folder.shared is None or not found.images:
        return guessed
    if config.method.name == "random":
        scores = {metric: found.metrics[metric] for metric in found.images}
    else:
        scores = _shared_scores(config, folder.shared, splits, ranks, sorted(found.images), wanted, conditions or Conditions())
    untrained = "the weights it starts from" if config.encoder.weights else f"random {config.encoder.name.name}"
    return {untrained: scores, **guessed} if scores else guessed


def _shared_scores(
    config: TrainConfig,
    shared: Path,
    splits: Splits,
    ranks: Ranks,
    metrics: list[str],
    wanted: Mapping[str, Sequence[str]] | None,
    conditions: Conditions,
) -> dict[str, float]:
    """Return the random encoder's scores from the sweep's folder; compute them if they are not there."""
    values = identity(config)
    given = json.dumps([metrics, *(values[key] for key in ("encoder", "data", "probes", "precision", "seed"))], sort_keys=True)
    path = shared / "references" / f"{hashlib.sha256(given.encode()).hexdigest()[:16]}.json"
    known: dict[str, float] | None = None
    with suppress(OSError, ValueError):
        if ranks.is_main:
            with reading(path):
                known = checked(dict[str, float], read_json(path), path.name)
    if (known := broadcast_object(known, ranks)) is not None:
        return known
    cause, outcome = "", Outcome()
    try:
        encoder = random_encoder(config, splits, ranks)
    except Exception as error:  # an image that a loader cannot open; the run's own scores remain valid
        cause = f"{type(error).__name__}: {error}"
    if not (cause := first_of(cause, ranks)):
        outcome = run_probes(encoder, config, splits, ranks, True, wanted, replace(conditions, folder=path.parent))
    for line in [cause] if cause else [f"{probe}: {why}" for probe, why in outcome.missing.items()]:
        log.warning("the encoder before training has no score: %s", line)
    scores = {metric: outcome.metrics[metric] for metric in metrics if metric in outcome.metrics}
    if ranks.is_main and len(scores) == len(metrics):
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, sealed_json(scores))
    return scores


def random_encoder(config: TrainConfig, splits: Splits, ranks: Ranks) -> nn.Module:
    """Return the encoder that a run of `config` starts from, with BatchNorm statistics over the training images.

    Weights of `encoder.weights` bring their own statistics.
    """
    alone = replace(config.encoder, sync_bn=False)  # every rank sees all images: there is nothing to synchronise
    seed = integer(config.seed, Stream.weights, 0)
    encoder: nn.Module = build_encoder(alone, config.data.image_size, seed, config.data.channels)
    encoder.to(device=ranks.device, dtype=weights_dtype(config), memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.encoder.weights:
        encoder.load_state_dict(weights.planned(config))
    else:
        calibrate_batchnorm(encoder, config, splits, ranks)
    return encoder
